r"""The definition of sorting tokens by expert and back, in torch: any device, float64 included.

Shapes: T tokens, k experts a token, E experts, H hidden. Token t has the *slots* tk to tk + k - 1. Sorted, there are
always Tk *rows*: first those of expert 0, in the order of the slots, then those of expert 1, and so on; then the slots
without an expert, whose rows are 0. So no shape depends on the data, and no device has to be waited for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """Tokens sorted by expert.

    The rows of expert e end before row ``ends[e]`` and begin where those of the expert before it end. A grouped product
    takes `ends` as it is: ``torch.nn.functional.grouped_mm(rows, weights, offs=order.ends)``. A loop over experts
    splits ``rows[: ends[-1]]`` by ``counts.tolist()``. What stands in the rows from ``ends[-1]`` on behind the experts
    does not matter: nothing reads them.

    Attributes:
        perm: [T k] int32, the slot of each row.
        inverse: [T, k] int32, the row of each slot; -1 where it has no expert.
        counts: [E] int64, rows of each expert.
        ends: [E] int32, the running sum of `counts`.
    """

    perm: Tensor
    inverse: Tensor
    counts: Tensor
    ends: Tensor


def sort(experts: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the slots by expert, stably: `perm`, `inverse` and `counts` of an `Order`.

    Args:
        experts: [T, k] int32; what is not from 0 to E - 1 is no expert.
        width: E.
    """
    flat = experts.flatten()
    there = (flat >= 0) & (flat < width)
    key = torch.where(there, flat, width)
    perm = key.argsort(stable=True)
    rows = torch.empty_like(perm).scatter_(0, perm, torch.arange(len(perm), device=perm.device))
    counts = torch.zeros(width + 1, dtype=torch.int64, device=key.device)
    counts.scatter_add_(0, key.long(), torch.ones_like(perm))
    return perm.int(), rows.masked_fill(~there, -1).int().view_as(experts), counts[:width]


def gather(tokens: Tensor, perm: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:
    """The token of each row, [T k, H]; 0 for rows without an expert.

    Args:
        tokens: [T, H].
        perm: of the order.
        inverse: of the order.
        counts: of the order.
    """
    rows = tokens.index_select(0, perm // max(inverse.shape[1], 1))
    return rows.masked_fill(_behind(perm, counts)[:, None], 0.0)


def combine(rows: Tensor, inverse: Tensor, gates: Tensor | None) -> Tensor:
    """The sum over each token's rows, weighted by its gates and accumulated in float32; [T, H], of the dtype of `rows`.

    Args:
        rows: [T k, H].
        inverse: of the order.
        gates: [T, k]; None for ones.
    """
    dtype = torch.float64 if rows.dtype is torch.float64 else torch.float32
    total = rows.new_zeros(inverse.shape[0], rows.shape[1], dtype=dtype)
    for slot in range(inverse.shape[1]):
        row = inverse[:, slot]
        term = rows.index_select(0, row.clamp(min=0)).to(dtype)
        term = term if gates is None else term * gates[:, slot, None].to(dtype)
        total = total + term.masked_fill(row[:, None] < 0, 0.0)
    return total.to(rows.dtype)


def combine_gradient(
    grad: Tensor, rows: Tensor, perm: Tensor, inverse: Tensor, counts: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `combine` by its rows, gate times `grad`, and by its gates, the dot products of both.

    Args:
        grad: [T, H], by what was combined.
        rows: [T k, H], what was combined.
        perm: of the order.
        inverse: of the order.
        counts: of the order.
        gates: [T, k].

    Returns:
        [T k, H], 0 for rows without an expert; [T, k], 0 for slots without one.
    """
    dtype = torch.float64 if rows.dtype is torch.float64 else torch.float32
    behind = _behind(perm, counts)[:, None]
    up = grad.to(dtype).index_select(0, perm // max(inverse.shape[1], 1))
    by_rows = (up * gates.to(dtype).flatten()[perm][:, None]).masked_fill(behind, 0.0)
    dots = (up * rows.to(dtype)).sum(1, keepdim=True).masked_fill(behind, 0.0).flatten()
    by_gates = torch.empty_like(dots).scatter_(0, perm.long(), dots).view_as(gates)
    return by_rows.to(rows.dtype), by_gates.to(gates.dtype)


def _behind(perm: Tensor, counts: Tensor) -> Tensor:
    """The rows without an expert, [T k] bool."""
    return torch.arange(len(perm), device=perm.device) >= counts.sum()
