"""The routers of a model with experts, seen from the engine: their load of a step, and where held-out tokens go.

Shapes: n = microbatches, r = data-parallel ranks, b = sequences in a microbatch, L = tokens in a sequence, s = those of
them on this rank, k = experts a token, m = layers with experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megacpt.engine.protocol import Batch, Choices
from megacpt.model.attention import context_slice
from megacpt.model.load import LayerLoad
from megacpt.model.router import Router

if TYPE_CHECKING:
    from megacpt.engine.megatron import MegatronEngine


def routers_of(chunks: Sequence[nn.Module]) -> list[Router]:
    """This rank's routers, in the order of the model."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]


def whole_model(loads: Mapping[int, LayerLoad], layers: Sequence[int], device: torch.device) -> dict[int, LayerLoad]:
    """The loads of all layers, on all ranks of the pipeline.

    Args:
        loads: of this pipeline stage's layers, by number.
        layers: numbers of all layers with experts.
        device: of the pipeline's communication.
    """
    table = torch.zeros(len(layers), len(LayerLoad._fields), dtype=torch.float64, device=device)
    for row, layer in zip(table, layers, strict=True):
        if layer in loads:
            row.copy_(torch.tensor(loads[layer], dtype=torch.float64))
    dist.all_reduce(table, group=parallel_state.get_pipeline_model_parallel_group())
    return {layer: LayerLoad(*row) for layer, row in zip(layers, table.tolist(), strict=True)}


def load_statistics(loads: Mapping[int, LayerLoad]) -> dict[str, float]:
    """The loads as scalars of a step's report."""
    if not loads:
        return {}
    found = {}
    for layer, load in loads.items():
        for name in ("max_load", "entropy", "dropped"):
            found[f"moe/layer-{layer}/{name}"] = getattr(load, name)
    found["moe/balance_loss"] = sum(load.penalty for load in loads.values()) / len(loads)
    found["moe/z_loss"] = sum(load.z for load in loads.values()) / len(loads)
    return found


def choices(engine: MegatronEngine, batches: Sequence[Batch]) -> Choices | None:
    """See `protocol.Engine.choices`."""
    if not engine.moe_layers:
        return None
    seen: dict[int, list[Tensor]] = {}
    for router in engine.routers:
        router.recorder = lambda layer, experts: seen.setdefault(layer, []).append(experts)
    try:
        engine.evaluate(batches)
    finally:
        for router in engine.routers:
            router.recorder = None
    return Choices(_together(engine, batches, seen), tuple(engine.moe_layers))


def _together(engine: MegatronEngine, batches: Sequence[Batch], seen: Mapping[int, list[Tensor]]) -> Any:
    """The experts [m, n * r * b, L, k] of all ranks' tokens: each rank fills in its own, and the sum joins them."""
    (microbatch, length), device = batches[0].tokens.shape, engine.device
    moe = engine.config.model.moe
    assert moe is not None
    places = _own_places(engine, length - 1, device)
    shape = len(engine.moe_layers), len(batches), engine.data_size, microbatch, length - 1, moe.top_k
    whole = torch.zeros(shape, dtype=torch.int32, device=device)
    for m, layer in enumerate(engine.moe_layers):
        for n, experts_sbk in enumerate(seen.get(layer, [])):  # empty on the other pipeline stages
            whole[m, n, engine.data_rank][:, places] = experts_sbk.transpose(0, 1) + 1
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(whole, group=group)
    dist.all_reduce(whole, group=parallel_state.get_pipeline_model_parallel_group())
    return (whole.flatten(1, 3) - 1).to(torch.int16).cpu().numpy()


def _own_places(engine: MegatronEngine, length: int, device: torch.device) -> Tensor:
    """[s], the positions of a sequence that this rank's routers see."""
    rank = parallel_state.get_context_parallel_rank()
    places = context_slice(torch.arange(length, device=device), 0, rank, engine.layout.context)
    if not engine.layout.sequence:
        return places
    own: Tensor = places.chunk(engine.layout.tensor)[parallel_state.get_tensor_model_parallel_rank()]
    return own
