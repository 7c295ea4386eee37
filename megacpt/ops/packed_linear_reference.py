r"""The torch definition of the product with a packed ternary matrix, and of the one with a matrix of 16-bit floats.

With codes :math:`q_{jk}`, scales :math:`s_{jc}` by column block c, and activations x:

"float"
    :math:`y_{tj} = \sum_c s_{jc} \sum_{k \in c} q_{jk} x_{tk}`, as of a dense matrix: zero times infinity is NaN.
"fp8"
    A token with the largest magnitude a, at least 1e-5, becomes the numbers :math:`u_k` of float8 e4m3 nearest to
    :math:`x_k / d`, with the scale :math:`d = a / 448`, as in training (`megacpt.quant.activations`). Then
    :math:`y_{tj} = d \sum_c s_{jc} \sum_{k \in c} q_{jk} u_k`.
"int8"
    Each column block is cut into pieces of 256 columns, from its beginning; the last one may be shorter. A piece p of
    a token with the largest magnitude a becomes the integers :math:`u_k = \mathrm{round}(x_k \cdot (127 / a))`, half
    to even, and the scale :math:`d_p = a / 127`. Then
    :math:`y_{tj} = \sum_c s_{jc} \sum_{p \in c} d_p \sum_{k \in p} q_{jk} u_k`. The innermost sums are exact; the
    others run in order, each quotient, product and sum rounded: in float32 this has one result, bit by bit. A piece
    that is nowhere as large as 2^-100 counts as zeros; NaN or infinity in one makes all results of its token NaN.

All accumulate in float32, or in float64 for float64, and round to the dtype of x once. Rounding activations by
blocks of 256 is that of llama.cpp's Q8_K.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megacpt.ops.packed_matrix import PackedMatrix

Activations = Literal["float", "int8", "fp8"]
PIECE = 256
LARGEST = 127
LARGEST8 = torch.finfo(torch.float8_e4m3fn).max  # 448
SMALLEST8 = 1e-5
SMALLEST = 2.0**-100  # so that neither 127 / a nor a / 127 leaves the normal numbers of float32


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def packed_linear(x: Tensor, matrix: PackedMatrix, activations: Activations) -> Tensor:
    """See `megacpt.ops.packed_linear.packed_linear`."""
    if activations == "int8":
        return _int8(_wide(x), matrix).to(x.dtype)
    if activations == "fp8":
        rounded, factors = float8(x)
        return (packed_linear(rounded.to(_wide(x).dtype), matrix, "float") * factors).to(x.dtype)
    wide = _wide(x)
    scales = matrix.scales.to(wide.dtype).repeat_interleave(matrix.i // matrix.scales.shape[1], 1)
    return (wide @ (matrix.codes() * scales).T).to(x.dtype)


def float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations to float8, token by token.

    Args:
        x: [T, i].

    Returns:
        The numbers u, [T, i] float8 e4m3, and the scales d, [T, 1] float32 (float64 for float64).
    """
    wide = _wide(x)
    scales = wide.abs().amax(1, keepdim=True).clamp(min=SMALLEST8) / LARGEST8
    return (wide / scales).clamp(-LARGEST8, LARGEST8).to(torch.float8_e4m3fn), scales


def round_activations(x: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Round activations to integers, by pieces of the column blocks.

    Args:
        x: [T, i] float32 or float64.
        blocks: C, the number of column blocks.

    Returns:
        The integers u, [T, C, P, 256] of the dtype of x, and the scales d, [T, C, P], for P pieces a column block.
    """
    pieces = _pieces(x, blocks)
    largest = pieces.abs().amax(-1)
    scales = torch.where(largest < SMALLEST, 0, largest / LARGEST)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    factors = torch.full_like(largest, LARGEST) / largest  # a number over a tensor would be rounded twice
    integers = (pieces * factors.unsqueeze(-1)).round()
    return torch.where((scales > 0).unsqueeze(-1), integers, 0), scales


def _pieces(values: Tensor, blocks: int) -> Tensor:
    width = values.shape[1] // blocks
    by_block = values.reshape(len(values), blocks, width)
    return F.pad(by_block, (0, -width % PIECE)).view(len(values), blocks, -(-width // PIECE), PIECE)


def _int8(x: Tensor, matrix: PackedMatrix) -> Tensor:
    blocks = matrix.scales.shape[1]
    integers, scales = round_activations(x, blocks)
    codes = _pieces(matrix.codes(), blocks).to(x.dtype)
    out = x.new_zeros(len(x), matrix.o)
    for block in range(blocks):
        total = torch.zeros_like(out)
        for piece in range(codes.shape[2]):
            exact = integers[:, block, piece] @ codes[:, block, piece].T
            total = total + exact * scales[:, block, piece, None]
        out = out + total * matrix.scales[:, block]
    return out


def half_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `megacpt.ops.half_linear.half_linear`."""
    return x @ weight.to(x.dtype).T
