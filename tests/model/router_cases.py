"""What the ranks of a pool run: a router alone, beside Megatron Core's own functions in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from megacpt.config.moe import MoEConfig
from megacpt.config.run import RunConfig
from megacpt.model.builder import transformer_config
from megacpt.model.load import end_step
from megacpt.model.router import Choice, Router
from megacpt.runtime.layout import Layout, enter_layout
from tests.distributed.cases import MODEL, run_config

S, B, E = 24, 3, 16


def router(**moe: Any) -> Router:
    """A router whose logits are what it reads."""
    config: RunConfig = run_config(model={**MODEL, "moe": {"experts": E, "top_k": 3, **moe}})
    layout = Layout(data=dist.get_world_size())
    enter_layout(layout, 1)
    settings: MoEConfig | None = config.model.moe
    assert settings is not None
    groups = ProcessGroupCollection.use_mpu_process_groups()
    made = Router(transformer_config(config.model, layout), groups, settings, dense=False)
    made.weight = torch.nn.Parameter(torch.eye(E))
    made.set_layer_number(1)
    return made


def draw(seed: int, spread: float = 2.0, skew: float = 1.0) -> Tensor:
    """Logits [S, B, E] of this rank, for which some experts are better than others."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    logits = spread * torch.randn(S, B, E, generator=generator)
    return logits + skew * torch.linspace(-1, 1, E)


def beside_megatron(scope: str, strength: float, beta: float) -> tuple[float, float, float]:
    """Largest differences of gates and gradients, and of the balance loss, from Megatron's in float64."""
    made = router(balance={"kind": "penalty", "strength": strength, "scope": scope}, z_loss=beta).train()
    hidden, up = draw(1), draw(2)
    ours = hidden.clone().requires_grad_()
    choice = Choice(*made(ours))
    choice.gates.backward(up.flatten(0, 1).gather(1, choice.experts.long()))

    theirs = hidden.double().requires_grad_()
    logits = theirs.flatten(0, 1)
    dense, chosen = moe_utils.topk_routing_with_score_function(logits, 3, use_pre_softmax=True)
    probabilities, tokens = logits.softmax(1), S * B
    counts = chosen.sum(0)
    if scope == "sequence":
        by_sequence = probabilities.view(S, -1), chosen.view(S, -1).sum(0)
        aux = moe_utils.switch_load_balancing_loss_func(*by_sequence, S, 3, E, strength) / B
    elif scope == "data":
        dist.all_reduce(counts)
        size = dist.get_world_size()
        # Its mean is over the tokens of all ranks; ours, over this rank's, is as many times larger.
        aux = size * moe_utils.switch_load_balancing_loss_func(probabilities, counts, size * tokens, 3, E, strength)
    elif scope == "microbatch":
        aux = moe_utils.switch_load_balancing_loss_func(probabilities, counts, tokens, 3, E, strength)
    else:  # before the first step all shares are even, and there is nothing to push
        aux = strength + 0.0 * probabilities.sum()
    ((dense * up.double().flatten(0, 1)).sum() + tokens * (aux + moe_utils.z_loss_func(logits, beta))).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    gates = (choice.gates - dense.gather(1, choice.experts.long())).abs().max()
    gradients = ((ours.grad - theirs.grad).abs() / (theirs.grad.abs() + 1e-2)).max()
    return float(gates), float(gradients), abs(float(made.load.penalty) / tokens / float(aux) - 1)


def learned(steps: int, skipped: int | None = None, frozen: bool = False, **moe: Any) -> dict[str, Any]:
    """What a router knows after some steps of two microbatches, and the loads that it saw."""
    made = router(**moe).train()
    made.weight.requires_grad_(not frozen)
    loads = []
    for step in range(steps):
        for microbatch in (0, 1):
            hidden = draw(10 * step + microbatch).requires_grad_()
            made(hidden)[0].sum().backward()
            with torch.no_grad():
                made(hidden)  # the first pass of a recomputed layer: nothing is learned from it
        loads.append(end_step([made], learn=step != skipped)[1]._asdict())
    state = {name: value.tolist() for name, value in made.named_buffers()}
    made.eval()
    with torch.no_grad():
        plain = Choice(*made(draw(77)))
        best = torch.topk(draw(77).flatten(0, 1), made.moe.top_k).indices
    return {
        "state": state,
        "loads": loads,
        "plain": bool(torch.equal(plain.experts.long(), best)),
        "idle": int(made.load.counts.sum()),
    }


def counts_of(steps: int) -> list[list[int]]:
    """How often each expert is chosen without a bias, for each step, over all ranks."""
    found = []
    for step in range(steps):
        logits = torch.cat([draw(10 * step + microbatch).flatten(0, 1) for microbatch in (0, 1)])
        counts = torch.bincount(torch.topk(logits, 3).indices.flatten(), minlength=E)
        dist.all_reduce(counts)
        found.append(counts.tolist())
    return found


def capacity(factor: float) -> dict[str, Any]:
    """The gates and experts of a router with and without a capacity."""
    hidden = draw(5, skew=2.0)
    free = Choice(*router()(hidden))
    bound = Choice(*router(capacity=factor)(hidden))
    with torch.no_grad():
        evaluated = Choice(*router(capacity=factor).eval()(hidden))
    named = {"free": free, "bound": bound, "evaluated": evaluated}
    return {name: [x.detach() for x in choice] for name, choice in named.items()}
