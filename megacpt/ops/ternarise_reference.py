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
from functools import cache
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
    outs: Sequence[Tensor] | None,
    halves: Sequence[int],
    packed: Sequence[Tensor] | None,
) -> Tensor:
    """See `megacpt.ops.ternarise.ternarise`."""
    counts = []
    for n, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        wide = weight.detach() if weight.dtype is torch.float64 else weight.detach().float()
        by_block = _by_block(wide, blocks_of(scale, halves[n]))
        of_block = scale.to(wide.dtype)[..., None, :, None, :, None]
        rounded = (by_block / of_block).clamp(-1, 1).round()
        codes = signs(rounded).view(weight.shape)
        former = 0 if outs is None else signs(outs[n])
        counts.append(torch.stack(((codes == 0).sum(), (codes != former).sum())))
        if outs is not None:
            outs[n].copy_((rounded * of_block + 0.0).reshape(weight.shape))
        if packed is not None:
            packed[n].copy_(packed_codes(codes))
    return torch.stack(counts) if counts else torch.empty(0, 2, dtype=torch.int64)


def joined_rows(rows: Tensor, blocks: Blocks) -> Tensor:
    """See `megacpt.ops.ternarise.joined_rows`."""
    view = rows.unflatten(-2, (blocks.halves, blocks.rows, -1))
    by_block = view.movedim(-4, -3).flatten(-3, -2)  # [..., R, halves * rows, C]
    return by_block.squeeze(-2) if by_block.shape[-2] == 1 else _in_lanes(by_block.transpose(-1, -2))


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
    fours = (F.pad(codes, (0, -codes.shape[-1] % 4)) + 1).contiguous().view(torch.int32)  # a byte for each of the four
    return (fours | fours >> 6 | fours >> 12 | fours >> 18).bitwise_and_(255).to(torch.uint8)


def kept_codes(kept: Tensor, width: int) -> Tensor:
    """The codes [..., i] int8 of what is kept of them: see `megacpt.ops.ternarise.unpack`; `width` is i."""
    table = _table(kept.device, kept.dtype)
    found = table.index_select(0, kept.view(torch.uint8).flatten().int()).view(torch.int8)
    codes: Tensor = found.view(*kept.shape[:-1], -1 if found.numel() else width)[..., :width]
    return codes.contiguous()


@cache
def _table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The code of each float8 e4m3 byte, [256] int8; or the four of each byte of four, as they lie in an int32."""
    byte = torch.arange(256)
    if dtype is torch.uint8:
        fours = torch.stack([(byte >> (2 * place) & 3) - 1 for place in range(4)], -1)
        return fours.to(torch.int8).view(torch.int32).flatten().to(device)
    values = byte.to(torch.uint8).view(dtype).float().nan_to_num(0.0)
    return values.clamp(-127, 127).to(torch.int8).to(device)


def unpack(kept: Tensor, scales: Tensor, out: Tensor, halves: int) -> None:
    """See `megacpt.ops.ternarise.unpack`."""
    blocks = blocks_of(scales, halves)
    of_block = scales.to(torch.promote_types(out.dtype, torch.float32))[..., None, :, None, :, None]
    torch.mul(_by_block(kept_codes(kept, out.shape[-1]), blocks), of_block, out=_by_block(out, blocks))


def _by_block(weight: Tensor, blocks: Blocks) -> Tensor:
    """[..., halves, R, rows, C, columns]."""
    view: Tensor = weight.unflatten(-2, (blocks.halves, blocks.rows, -1)).unflatten(-1, (blocks.columns, -1))
    return view


def _abs_sums(weight: Tensor, blocks: Blocks) -> Tensor:
    rows = _in_lanes(_by_block(weight, blocks).double().abs())  # [..., halves, R, rows, C]
    return joined_rows(rows.flatten(-4, -2), blocks)


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
