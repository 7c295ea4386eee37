r"""The definition of ternary quantisation of lists of matrices, in torch: any device, float64 included.

Shapes: a weight is [..., o, i], where leading dimensions count matrices (experts, say). It has R x C *blocks* with a
scale each, o / R rows by i / C columns. A matrix of `halves` = 2 is two of o / 2 rows above each other (gate and up
projections) that share their scales: block r covers rows part r of either half.

With scale :math:`\gamma`, the code of a weight w is :math:`\mathrm{round}(\mathrm{clip}(w / \gamma, -1, 1))`, half to
even (TriLM, arXiv 2407.12327, table 1; BitNet b1.58): 1 where :math:`w > \gamma / 2`, -1 where :math:`w < -\gamma / 2`,
and 0 elsewhere, at :math:`\gamma / 2` itself too. Its value is code times scale, never -0. A NaN has the code 0 and the
value NaN; where a scale is NaN or infinite, zero codes have the value NaN, so that neither goes unseen.

Absolute sums are float64 and their order is part of the definition, so that every device and number of threads gives
the same bits: the columns of a row of a block are summed in 128 lanes (column j in lane j mod 128, in order), lanes are
joined in halves (0 with 64, then 0 with 32, ...), and the rows of a block are summed likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 128  # of the kernels too


class Blocks(NamedTuple):
    """How the scales of a matrix lie on it.

    Attributes:
        rows: R, blocks above each other.
        columns: C, blocks beside each other.
        halves: 2 if it is two matrices above each other that share their scales, else 1.
    """

    rows: int
    columns: int
    halves: int = 1


def blocks_of(scales: Tensor, halves: int) -> Blocks:
    """The blocks of a matrix with scales [..., R, C]."""
    return Blocks(scales.shape[-2], scales.shape[-1], halves)


def block_abs_sums(weights: Sequence[Tensor], blocks: Sequence[Blocks]) -> list[Tensor]:
    """See `megacpt.ops.ternarise.block_abs_sums`."""
    return [_abs_sums(weight.detach(), at) for weight, at in zip(weights, blocks, strict=True)]


def ternarise(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    halves: Sequence[int],
    packed: Sequence[Tensor] | None,
) -> Tensor:
    """See `megacpt.ops.ternarise.ternarise`."""
    counts = []
    for n, (weight, scale, out) in enumerate(zip(weights, scales, outs, strict=True)):
        wide = weight.detach() if weight.dtype is torch.float64 else weight.detach().float()
        by_block = _by_block(wide, blocks_of(scale, halves[n]))
        of_block = scale.to(wide.dtype)[..., None, :, None, :, None]
        rounded = (by_block / of_block).clamp(-1, 1).round()
        values = (rounded * of_block + 0.0).reshape(weight.shape)
        codes = signs(rounded).view(weight.shape)
        counts.append(torch.stack(((codes == 0).sum(), (codes != signs(out)).sum())))
        out.copy_(values)
        if packed is not None:
            packed[n].copy_(packed_codes(codes))
    return torch.stack(counts) if counts else torch.empty(0, 2, dtype=torch.int64)


def signs(values: Tensor) -> Tensor:
    """The codes of values, [...] int8 in {-1, 0, 1}: their signs, 0 for NaN."""
    return (values > 0).to(torch.int8) - (values < 0).to(torch.int8)


def packed_codes(codes: Tensor) -> Tensor:
    """Pack four codes a byte, row by row: code + 1 in bits 2j and 2j + 1 for j = 0..3; missing ones are zero codes.

    Args:
        codes: [..., i] int8, in {-1, 0, 1}.

    Returns:
        [..., ceil(i / 4)] uint8.
    """
    stored: Tensor = (F.pad(codes, (0, -codes.shape[-1] % 4)) + 1).to(torch.uint8).unflatten(-1, (-1, 4))
    return stored[..., 0] | stored[..., 1] << 2 | stored[..., 2] << 4 | stored[..., 3] << 6


def _by_block(weight: Tensor, blocks: Blocks) -> Tensor:
    """[..., halves, R, rows, C, columns]."""
    view: Tensor = weight.unflatten(-2, (blocks.halves, blocks.rows, -1)).unflatten(-1, (blocks.columns, -1))
    return view


def _abs_sums(weight: Tensor, blocks: Blocks) -> Tensor:
    rows = _in_lanes(_by_block(weight, blocks).double().abs())  # [..., halves, R, rows, C]
    rows = rows.movedim(-4, -3).flatten(-3, -2)  # [..., R, halves * rows, C]
    return _in_lanes(rows.transpose(-1, -2))


def _in_lanes(values: Tensor) -> Tensor:
    """The sums over the last dimension, in the order of the definition."""
    padded: Tensor = F.pad(values, (0, -values.shape[-1] % LANES)).unflatten(-1, (-1, LANES))
    total = padded.new_zeros(*padded.shape[:-2], LANES)
    for step in padded.unbind(-2):
        total = total + step
    while total.shape[-1] > 1:
        first, second = total.chunk(2, -1)
        total = first + second
    return total.squeeze(-1)
