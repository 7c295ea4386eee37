"""The shards of Megatron's distributed optimizer: gathered to whole tensors, and filled from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WEIGHT = "param"


def gather(owner: Any, kinds: Sequence[str]) -> dict[tuple[int, str], Tensor]:
    """Bring the shards of a distributed optimizer together on every rank; all ranks of its data axis call this.

    Args:
        owner: the distributed optimizer.
        kinds: ``param`` for the float32 weights, or names of its state.

    Returns:
        (identity of the model's parameter, kind) to a float32 tensor of the parameter's shape, on the CPU.
    """
    full: dict[tuple[int, str], Tensor] = {}
    ranks = owner.data_parallel_group.size()
    for index, buffer in enumerate(owner.buffers):
        (ranges,) = owner.gbuf_ranges[index].values()
        flat = {kind: torch.empty(buffer.numel, dtype=torch.float32) for kind in kinds}
        for bucket, shard in zip(buffer.buckets, ranges, strict=True):
            size = bucket.grad_data.numel()
            for kind in kinds:
                mine = torch.zeros(size // ranks, dtype=torch.float32, device=bucket.grad_data.device)
                for parameter, where in shard["param_map"].items():
                    part = where["gbuf_local"]
                    mine[part.start : part.end] = _shard(owner, parameter, kind).detach()
                whole = torch.empty(size, dtype=torch.float32, device=mine.device)
                dist.all_gather_into_tensor(whole, mine, group=owner.data_parallel_group)
                flat[kind][bucket.offset : bucket.offset + size] = whole.cpu()
        for parameter, (start, end, _) in buffer.param_index_map.items():
            for kind in kinds:
                full[id(parameter), kind] = flat[kind][start:end].view(parameter.shape)
    return full


def gather_counts(owner: Any, moments: Sequence[str]) -> dict[int, dict[str, float]]:
    """Return how many updates are in each mean of each parameter, also of those that other ranks hold.

    All ranks of the data axis call this.
    """
    parameters = [parameter for buffer in owner.buffers for parameter in buffer.param_index_map]
    counts = torch.zeros(len(parameters), len(moments), dtype=torch.float64)
    for row, parameter in zip(counts, parameters, strict=True):
        if parameter in owner.model_param_gbuf_map:
            held = owner.optimizer.counts[_shard(owner, parameter, WEIGHT)]
            row.copy_(torch.tensor([held[moment] for moment in moments], dtype=torch.float64))
    if counts.numel():
        device = owner.buffers[0].grad_data.device
        moved = counts.to(device)
        dist.all_reduce(moved, dist.ReduceOp.MAX, group=owner.data_parallel_group)
        counts = moved.cpu()
    rows = (dict(zip(moments, row, strict=True)) for row in counts.tolist())
    return {id(parameter): row for parameter, row in zip(parameters, rows, strict=True)}


def scatter(owner: Any, parameter: Tensor, values: Mapping[str, Tensor], counts: Mapping[str, float]) -> None:
    """Copy this rank's range of a whole weight and its state into its shard, with the age of the state."""
    if parameter not in owner.model_param_gbuf_map:
        return
    where = owner._get_model_param_range_map(parameter)["param"]
    for kind, value in values.items():
        _shard(owner, parameter, kind).copy_(value.reshape(-1)[where.start : where.end])
    owner.optimizer.counts[_shard(owner, parameter, WEIGHT)] = dict(counts)


def _shard(owner: Any, parameter: Tensor, kind: str) -> Tensor:
    """Return this rank's part of the weight of a parameter, or of a mean of it."""
    group, order = owner.model_param_group_index_map[parameter]
    main: Tensor = owner.optimizer.param_groups[group]["params"][order]
    if kind == WEIGHT:
        return main
    state: Tensor = owner.optimizer.state[main][kind]
    return state
