"""The capacity of experts: which choices are dropped where an expert has too many tokens."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megacpt.ops.router_reference import Routing


def within_capacity(routing: Routing, factor: float, group: dist.ProcessGroup) -> Tensor:
    """Which choices an expert has room for: those with the highest gates, of equal gates those that come first.

    The microbatch is looked at as a whole, whatever ranks its tokens are on; only which of two equal gates comes first
    depends on the layout.

    Args:
        routing: of this rank's tokens [T].
        factor: room of an expert, as a multiple of its even share k * T / E of the microbatch (rounded up).
        group: the ranks that share the microbatch.

    Returns:
        [T, k] bool.
    """
    gates, experts = routing.gates.detach().contiguous(), routing.experts
    rank, size = group.rank(), group.size()
    if size > 1:
        gates, experts = _gathered(gates, group), _gathered(experts.contiguous(), group)
    tokens, k = experts.shape
    width = routing.counts.numel()
    room = math.ceil(factor * k * tokens / width)
    flat_gates, flat_experts = gates.flatten(), experts.flatten().long()
    by_gate = torch.argsort(flat_gates.nan_to_num(0.0), descending=True, stable=True)
    order = by_gate[torch.argsort(flat_experts[by_gate], stable=True)]
    counts = torch.bincount(flat_experts.clamp(min=0) * (flat_experts >= 0), minlength=width)
    dropped = int((flat_experts < 0).sum())
    counts[0] -= dropped  # padding was counted there
    firsts = dropped + torch.cumsum(counts, 0) - counts
    places = torch.arange(order.numel(), device=order.device) - firsts[flat_experts[order].clamp(min=0)]
    kept = torch.empty_like(flat_experts, dtype=torch.bool)
    kept[order] = places < room
    kept &= flat_experts >= 0
    return kept.view(size, -1, k)[rank]


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(whole, x, group=group)
    return whole
