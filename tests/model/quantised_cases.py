"""What the ranks of a pool run: quantised layers in float64, and what is kept of their weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megacpt.checkpoint.tensors import load_tensors, save_tensors
from megacpt.config import QuantiseConfig
from megacpt.engine.megatron import MegatronEngine
from megacpt.model.builder import transformer_config
from megacpt.model.quantised import QuantisedColumnLinear, QuantisedExpertWeights, QuantisedRowLinear, Quantiser
from megacpt.quant.activations import round_tokens
from megacpt.quant.hadamard import transform
from megacpt.quant.matrix import quantise_matrix
from megacpt.quant.scales import expand
from megacpt.runtime.layout import Layout, enter_layout
from tests.distributed.cases import VOCAB, batches, run_config

HIDDEN, FFN, TOKENS = 16, 24, 6


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _config(tensor: int, sequence: bool = False) -> Any:
    layout = Layout(tensor=tensor, sequence=sequence)
    enter_layout(layout, 1)
    config = transformer_config(run_config().model, layout)
    config.params_dtype = torch.float64
    return config


def _used(weight: Tensor, quantise: QuantiseConfig, split_dim: Any, halves: int = 1) -> Tensor:
    """The definition: the quantised matrix, with the gradient of the latent one."""
    made = quantise_matrix(weight.detach(), quantise, split_dim, halves)
    if made.transform > 1:  # QuEST: in the transformed basis, where a weight is within half a step of its level
        turned, scales = transform(weight, made.transform), expand(made.scales, *weight.shape).double()
        level = made.codes * scales
        trusted = (turned.detach() - level).abs() <= scales
        return transform(turned * trusted + (level - turned * trusted).detach(), made.transform)
    return weight + (made.dense(torch.float64) - weight).detach()


def layers(quantise: dict[str, Any], tensor: int, sequence: bool, cache: Any) -> dict[str, float]:
    """A gated first and a second layer beside their definition on whole matrices: the largest differences."""
    config = _config(tensor, sequence)
    settings = QuantiseConfig.model_validate(quantise)
    rank = parallel_state.get_tensor_model_parallel_rank()
    options: dict[str, Any] = {"config": config, "init_method": lambda w: w, "bias": False, "skip_bias_add": True}
    first = QuantisedColumnLinear(
        HIDDEN, 2 * FFN, gather_output=False, stride=2, quantise=settings, cache=cache, halves=2, **options
    )
    second = QuantisedRowLinear(FFN, HIDDEN, input_is_parallel=True, quantise=settings, cache=cache, **options)
    whole = [_draw(2 * FFN, HIDDEN, seed=1).requires_grad_(), _draw(HIDDEN, FFN, seed=2).requires_grad_()]
    rows = [
        torch.cat([half.chunk(tensor)[rank] for half in whole[0].detach().chunk(2)]),
        whole[1].detach().chunk(tensor, 1)[rank],
    ]
    with torch.no_grad():
        first.weight.copy_(rows[0])
        second.weight.copy_(rows[1])
    x, grad = _draw(TOKENS, 2, HIDDEN, seed=3), _draw(TOKENS, 2, HIDDEN, seed=4)

    wanted_x = x.clone().requires_grad_()
    gate, up = F.linear(round_tokens(wanted_x, settings.activations), _used(whole[0], settings, 0, 2)).chunk(2, -1)
    wanted = F.linear(round_tokens(gate.tanh() * up, settings.activations), _used(whole[1], settings, 1))
    wanted.backward(grad)

    own = (lambda t: t.chunk(tensor)[rank]) if sequence else (lambda t: t)
    found_x = own(x).clone().requires_grad_()
    gate, up = first(found_x)[0].chunk(2, -1)
    found = second(gate.tanh() * up)[0]
    found.backward(own(grad))
    assert wanted_x.grad is not None
    assert whole[0].grad is not None
    assert whole[1].grad is not None
    grads = [
        torch.cat([half.chunk(tensor)[rank] for half in whole[0].grad.chunk(2)]),
        whole[1].grad.chunk(tensor, 1)[rank],
    ]
    pairs = {
        "output": (found, own(wanted)),
        "input": (found_x.grad, own(wanted_x.grad)),
        "first": (first.weight.grad, grads[0]),
        "second": (second.weight.grad, grads[1]),
    }
    return {name: float((a - b).detach().abs().max() / b.detach().abs().max()) for name, (a, b) in pairs.items()}


def experts(quantise: dict[str, Any]) -> dict[str, float]:
    """A matrix of three experts beside its definition: the largest differences."""
    config = _config(1)
    settings = QuantiseConfig.model_validate(quantise)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    made = QuantisedExpertWeights(config, 3, 8, HIDDEN, groups, quantise=settings, cache="dense", split_dim=0, halves=2)
    weight = (_draw(3, 8, HIDDEN, seed=5) * torch.tensor([1.0, 3.0, 0.2])[:, None, None]).requires_grad_()
    with torch.no_grad():
        made.weight.copy_(weight)
    x, counts = _draw(9, HIDDEN, seed=6), torch.tensor([4, 0, 5])
    grad = _draw(9, 8, seed=7)
    rounded = round_tokens(x, settings.activations)
    parts = [
        F.linear(rounded[rows], _used(weight[e], settings, 0, 2)) for e, rows in ((0, slice(0, 4)), (2, slice(4, 9)))
    ]
    wanted = torch.cat(parts)
    wanted.backward(grad)
    found = made(x, counts)
    found.backward(grad)
    assert weight.grad is not None
    assert made.weight.grad is not None
    return {
        "output": float((found - wanted).abs().max()),
        "weight": float((made.weight.grad - weight.grad).abs().max()),
    }


def _engine(changes: dict[str, Any]) -> MegatronEngine:
    return MegatronEngine(run_config(**changes), VOCAB)


def _step(engine: MegatronEngine, step: int) -> dict[str, float]:
    config = engine.config
    mine = batches(config, step, engine.data_rank, engine.data_size)
    return engine.train_step(mine, config.optim.peak_lr, config.optim.weight_decay).statistics


def _counts(engine: MegatronEngine) -> set[int]:
    return {quantiser.rebuilt for quantiser in engine.quantisers.all}


def rebuilds(changes: dict[str, Any]) -> list[set[int]]:
    """How often weights have been quantised, after each thing that an engine does."""
    engine = _engine(changes)
    seen = [_counts(engine)]
    held_out = batches(engine.config, 99, engine.data_rank, engine.data_size)

    def broken_step() -> None:
        weight = next(engine.chunks[0].parameters())
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(float("nan"))
        _step(engine, 7)
        with torch.no_grad():
            weight.copy_(kept)

    def other_weights() -> None:
        with torch.no_grad():
            for quantiser in engine.quantisers.all:
                quantiser.weight.mul_(2)

    acts: list[Callable[[], Any]] = [
        lambda: engine.evaluate(held_out),
        lambda: _step(engine, 1),
        lambda: engine.evaluate(held_out),
        lambda: _step(engine, 2),
        broken_step,
        lambda: engine.load({name: part.data for name, part in engine.state().items()}),
        lambda: engine.evaluate(held_out),
        other_weights,
        lambda: engine.evaluate(held_out),
    ]
    for act in acts:
        act()
        seen.append(_counts(engine))
    return seen


def statistics(changes: dict[str, Any]) -> dict[str, Any]:
    """The statistics of a step, and what a loop over the matrices before and after it says."""
    engine = _engine(changes)
    settings = engine.config.model.quantise
    assert settings is not None

    def codes() -> list[Tensor]:
        gated = engine.config.model.gated
        named = [(n, p) for n, p in engine.chunks[0].named_parameters() if p.dim() > 1 and "linear_" in n]
        return [
            quantise_matrix(p, settings, 0 if "qkv" in n or "fc1" in n else 1, 2 if "fc1" in n and gated else 1).codes
            for n, p in named
        ]

    before = codes()
    reported = _step(engine, 1)
    after = codes()
    total = sum(each.numel() for each in after)
    return {
        "reported": reported,
        "zeros": sum(int((each == 0).sum()) for each in after) / total,
        "flips": sum(int((a != b).sum()) for a, b in zip(before, after, strict=True)) / total,
        "matrices": len(after) - len(engine.quantisers.all),
    }


def memory(cache: Any) -> dict[str, Any]:
    """Whether the dense matrix of a layer is still there between the forward and the backward pass."""
    config = _config(1)
    settings = QuantiseConfig(grid="ternary")
    options: dict[str, Any] = {"config": config, "init_method": nn.init.normal_, "bias": False, "skip_bias_add": True}
    layer = QuantisedRowLinear(FFN, HIDDEN, input_is_parallel=True, quantise=settings, cache=cache, **options)
    made: list[weakref.ref[Any]] = []
    original = layer.quantiser.cache.matrix

    def matrix() -> Tensor:
        found = original()
        made.append(weakref.ref(found.untyped_storage()))
        return found

    layer.quantiser.cache.matrix = matrix  # type: ignore[method-assign]
    x = _draw(TOKENS, 2, FFN, seed=1).requires_grad_()
    out = layer(x)[0]
    between = sum(ref() is not None for ref in made)
    out.sum().backward()
    return {"between": between, "made": len(made), "rebuilt": layer.quantiser.rebuilt}


def scales(changes: dict[str, Any], load: str | None = None, save: str | None = None, steps: int = 0) -> dict[str, Any]:
    """The loss and the scales of a model, some steps later; how many sizes of weights each matrix has."""
    engine = _engine(changes)
    if load:
        engine.load(load_tensors(engine.state(), Path(load)))
    for step in range(steps):
        _step(engine, step)
    if save:
        save_tensors(engine.state(), Path(save))
    evaluation = engine.evaluate(batches(engine.config, 999, engine.data_rank, engine.data_size))
    quantisers: list[Quantiser] = engine.quantisers.all
    return {
        "evaluation": evaluation,
        "scales": [each.scales.flatten().tolist() for each in quantisers],
        "sizes": [each.cache.matrix().abs().unique().tolist() for each in quantisers],
    }
