"""A ternary matrix in 2 bits a weight, in the layout that the kernels of its device read; there is no other copy.

On the CPU, and wherever nothing else is asked for, a matrix is in *units*. Codes are stored as code + 1, in 0..2. Each
row is cut into its C column blocks, each block into units of 128 weights (the last one filled up with zero codes), each
unit into 32 bytes: bits 2g and 2g + 1 of byte b hold the weight 32 g + b of the unit, for g = 0..3. So a register of
bytes, shifted and masked, is 32 neighbours, and a register of 32-bit lanes, shifted by 2 s, is one number of two bits a
lane in its lowest bits.

On CUDA it is in *tiles* of 16 rows by 128 columns, in the order in which a warp feeds them to its tensor cores. Thread
4 g + t of the warp has four words of a tile: rows g and g + 8 of its first 64 columns, then of its last. A word holds
the 16 columns from 16 t on: column 2 p + e has the bits 15 - 2 p and 14 - 2 p of half e, which are 00 for 0, 01 for 1
and 11 for -1.

Shapes: o rows, i columns, C column blocks of i / C weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

UNIT = 128  # weights
UNIT_BYTES = UNIT // 4
TILE_ROWS, TILE_COLUMNS = 16, 128
_SHIFTS = (0, 2, 4, 6)
_PLACES = [(p, e, 16 * e + 14 - 2 * p) for p in range(8) for e in range(2)]  # column 2 p + e of a word, its lowest bit


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix of ternary codes with scales, made by `pack_matrix`.

    Attributes:
        data: in units [o, C * units * 32] uint8, in tiles [ceil(o / 16), ceil(i / 128), 32, 4] int32; contiguous.
        scales: [o, C] float32, contiguous; what a code of 1 is worth.
        i: the number of columns.
    """

    data: Tensor
    scales: Tensor
    i: int

    @property
    def o(self) -> int:
        """The number of rows."""
        return self.scales.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the matrix lies."""
        return self.data.device

    @property
    def tiled(self) -> bool:
        """Whether it is in tiles."""
        return self.data.dtype is torch.int32

    def codes(self) -> Tensor:
        """The codes, [o, i] int8."""
        if self.tiled:
            return _from_tiles(self.data)[: self.o, : self.i]
        blocks = self.scales.shape[1]
        units = self.data.view(self.o, -1, 1, UNIT_BYTES)
        codes = torch.cat([units >> shift & 3 for shift in _SHIFTS], 2).to(torch.int8) - 1
        return codes.view(self.o, blocks, -1)[..., : self.i // blocks].reshape(self.o, self.i)


def pack_matrix(codes: Tensor, scales: Tensor, tiled: bool | None = None) -> PackedMatrix:
    """Bring a ternary matrix into the layout of the kernels.

    Args:
        codes: [o, i] int8, in {-1, 0, 1}.
        scales: [R, C] float32; block (r, c) of the matrix, o / R rows by i / C columns, has scale (r, c).
        tiled: in tiles, as CUDA's kernels read it, or in units; None for what kernels of the device of `codes` read.

    Raises:
        ValueError: shapes, dtypes or codes do not fit.
    """
    if codes.dim() != 2 or codes.dtype is not torch.int8 or not codes.numel():
        raise ValueError(f"codes must be [o, i] int8 and not empty, not {list(codes.shape)} {codes.dtype}")
    o, i = codes.shape
    if scales.dim() != 2 or scales.dtype is not torch.float32 or not scales.numel():
        raise ValueError(f"scales must be [R, C] float32 and not empty, not {list(scales.shape)} {scales.dtype}")
    rows, blocks = scales.shape
    if o % rows or i % blocks:
        raise ValueError(f"scales [{rows}, {blocks}] do not divide a matrix [{o}, {i}]: R must divide o, and C i")
    if codes.device != scales.device:
        raise ValueError(f"codes are on {codes.device} and scales on {scales.device}; they must be on one device")
    if codes.min() < -1 or codes.max() > 1:
        raise ValueError(f"codes must be -1, 0 or 1; these range from {int(codes.min())} to {int(codes.max())}")
    expanded = scales.repeat_interleave(o // rows, 0).contiguous()
    in_tiles = codes.is_cuda if tiled is None else tiled
    return PackedMatrix(_tiles(codes) if in_tiles else _units(codes, blocks), expanded, i)


def _units(codes: Tensor, blocks: int) -> Tensor:
    o, i = codes.shape
    stored = (F.pad(codes.reshape(o, blocks, i // blocks), (0, -(i // blocks) % UNIT)) + 1).to(torch.uint8)
    groups = stored.view(o, -1, len(_SHIFTS), UNIT_BYTES).unbind(2)
    return (groups[0] | groups[1] << 2 | groups[2] << 4 | groups[3] << 6).view(o, -1)


def _tiles(codes: Tensor) -> Tensor:
    o, i = codes.shape
    fields = F.pad(codes, (0, -i % TILE_COLUMNS, 0, -o % TILE_ROWS)) & 3
    # By the tile's row, the half of its rows, g; the tile's column, the half of its columns, t; p and e.
    view = fields.view(-(-o // TILE_ROWS), 2, 8, -(-i // TILE_COLUMNS), 2, 4, 8, 2)
    words = torch.zeros(view.shape[:-2], dtype=torch.int32, device=codes.device)
    for p, e, bit in _PLACES:
        words |= view[..., p, e].int() << bit
    return words.permute(0, 3, 2, 5, 4, 1).reshape(words.shape[0], words.shape[3], 32, 4)


def _from_tiles(tiles: Tensor) -> Tensor:
    """The codes of whole tiles, int8."""
    rows, columns = tiles.shape[:2]
    words = tiles.view(rows, columns, 8, 4, 2, 2).permute(0, 5, 2, 1, 4, 3)
    fields = torch.stack([(words >> bit & 3).to(torch.int8) for _, _, bit in _PLACES], -1)
    codes = torch.where(fields == 3, -1, fields)
    return codes.reshape(rows * TILE_ROWS, columns * TILE_COLUMNS)
