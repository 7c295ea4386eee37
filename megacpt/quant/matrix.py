"""A quantised matrix: codes and scales, made of a whole one of full precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from megacpt.quant.grids import Grid, make_grid
from megacpt.quant.hadamard import transform
from megacpt.quant.scales import Blocks, expand, rounded

if TYPE_CHECKING:
    from megacpt.config.quantise import QuantiseConfig


@dataclass(frozen=True)
class Quantised:
    """A matrix of codes times scales.

    Attributes:
        codes: [.., o, i] int8.
        scales: [.., R, C] float32: one for each block of o/R rows and i/C columns.
        transform: codes times scales are the matrix whose rows went through Walsh-Hadamard transforms of this length
            (QuEST); 1 for none.
    """

    codes: Tensor
    scales: Tensor
    transform: int = 1

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix itself, [.., o, i]: products in float32 (float64 for float64), rounded once."""
        return dense(self.codes, expand(self.scales, *self.codes.shape[-2:]), self.transform, dtype)


def dense(codes: Tensor, scales: Tensor, length: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Multiply codes with their scales.

    Args:
        codes: [.., n] int8.
        scales: float32, broadcast against codes.
        length: of the transform that is undone afterwards; 1 for none.
        dtype: of the result.
        out: where to put it; of the shape of the codes.
    """
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device) if out is None else out
    working = scales.to(torch.promote_types(dtype, torch.float32))
    if length == 1:
        return torch.mul(codes, working, out=out)
    return out.copy_(transform(codes * working, length))


def quantise_matrix(weight: Tensor, config: QuantiseConfig, split_dim: Literal[0, 1], halves: int = 1) -> Quantised:
    """Quantise a whole matrix as a layer of the model does, whatever the layout it was trained in.

    Args:
        weight: [.., o, i], of any floating dtype.
        config: `model.quantise`.
        split_dim: the dimension that tensor parallelism and shards cut: 0 for linear_qkv and linear_fc1, 1 for
            linear_proj and linear_fc2.
        halves: 2 for a gated linear_fc1, [gate; up], whose halves share scales.
    """
    blocks = Blocks.of((weight.shape[-2], weight.shape[-1]), config.scale, split_dim, halves)
    grid = make_grid(config)
    weight = weight.detach().contiguous()
    measured = joined(grid, grid.measure([weight], [blocks])[0], blocks.size(weight))
    scales = rounded(grid.scales(measured), config.scale.format)
    return Quantised(grid.codes(weight, scales, measured, blocks), blocks.whole(scales), grid.transform)


def joined(grid: Grid, measured: Tensor, size: int) -> Tensor:
    """Sums of blocks of `size` weights as means; maxima as they are."""
    return measured / size if grid.joined == "mean" else measured
