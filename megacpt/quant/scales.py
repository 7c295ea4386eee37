"""Blocks of a matrix that share a scale.

Shapes: o = rows (outputs), i = columns (inputs), R x C = blocks, H = halves: a gated first matrix of an MLP is two
stacked ones, gate and up, of which equal parts share a scale. Leading dimensions (experts) are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from megacpt.ops import ternarise

if TYPE_CHECKING:
    from megacpt.config.quantise import ScaleConfig

FORMATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_INSIDE = (-5, -3, -1)  # dimensions of a view by blocks that lie within a block


class Blocks(ternarise.Blocks):
    """How a matrix, or the part of it on a rank, is cut into R x C blocks of H halves."""

    @classmethod
    def of(
        cls, shape: tuple[int, int], scale: ScaleConfig, split_dim: Literal[0, 1], halves: int = 1, ranks: int = 1
    ) -> Blocks:
        """The blocks of a rank's part of a matrix.

        Args:
            shape: o and i of the part.
            scale: what shares a scale.
            split_dim: the dimension that tensor parallelism and shards cut: 0 for rows, 1 for columns.
            halves: H; 2 for a gated first matrix.
            ranks: how many ranks the matrix is split over.
        """
        if scale.group is not None:
            return cls(shape[0], shape[1] // scale.group)
        parts = max((scale.shards or 1) // ranks, 1)
        return cls(parts, 1, halves) if split_dim == 0 else cls(1, parts, halves)

    def view(self, matrix: Tensor) -> Tensor:
        """[.., o, i] as [.., H, R, o/(H R), C, i/C]."""
        *lead, o, i = matrix.shape
        rows = o // (self.halves * self.rows)
        return matrix.view(*lead, self.halves, self.rows, rows, self.columns, i // self.columns)

    def spread(self, scales: Tensor) -> Tensor:
        """[.., R, C] as [.., 1, R, 1, C, 1], which meets each weight of a `view` with its scale."""
        return scales[..., None, :, None, :, None]

    def whole(self, scales: Tensor) -> Tensor:
        """[.., R, C] as the scales of a plain cut of the rows, [.., H R, C]; one scale for all rows stays one."""
        if self.rows == 1:
            return scales
        return scales.repeat(*(1,) * (scales.ndim - 2), self.halves, 1)

    def size(self, matrix: Tensor) -> int:
        """Weights of a block."""
        return matrix.shape[-2] * matrix.shape[-1] // (self.rows * self.columns)

    def sums(self, matrix: Tensor) -> Tensor:
        """Sums of the blocks of [.., o, i] in float64, [.., R, C]."""
        return self.view(matrix).sum(_INSIDE, dtype=torch.float64)

    def largest(self, matrix: Tensor) -> Tensor:
        """Maxima of the blocks of [.., o, i] in float64, [.., R, C]."""
        return self.view(matrix).amax(_INSIDE).double()


def expand(scales: Tensor, o: int, i: int) -> Tensor:
    """Give every entry of a matrix [.., o, i] its scale of [.., R, C], R dividing o and C dividing i."""
    *lead, rows, columns = scales.shape
    spread = scales[..., :, None, :, None].expand(*lead, rows, o // rows, columns, i // columns)
    return spread.reshape(*lead, o, i)


def rounded(scales: Tensor, form: str) -> Tensor:
    """Round float64 scales to float32 once, and then to what a file keeps of them; larger ones become its largest."""
    dtype = FORMATS[form]
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return scales.clamp(max=largest).to(torch.float32).to(dtype).to(torch.float32)
