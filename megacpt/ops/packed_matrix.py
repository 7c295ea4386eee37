"""A ternary matrix in 2 bits a weight, in the layout that the kernels read.

Codes are stored as code + 1, in 0..2. Each row is cut into its C column blocks, each block into units of 128 weights
(the last one filled up with zero codes), each unit into 32 bytes: bits 2g and 2g + 1 of byte b hold the weight
32 g + b of the unit, for g = 0..3. So a register of bytes, shifted and masked, is 32 neighbours, and a register of
32-bit lanes, shifted by 2 s, is one number of two bits a lane in its lowest bits.

Shapes: o rows, i columns, C column blocks of i / C weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

UNIT = 128  # weights
UNIT_BYTES = UNIT // 4
_SHIFTS = (0, 2, 4, 6)


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix of ternary codes with scales, made by `pack_matrix`.

    Attributes:
        data: [o, C * units * 32] uint8, contiguous.
        scales: [o, C] float32, contiguous; what a code of 1 is worth.
        i: the number of columns.
    """

    data: Tensor
    scales: Tensor
    i: int

    @property
    def o(self) -> int:
        """The number of rows."""
        return self.data.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the matrix lies."""
        return self.data.device

    def to(self, device: torch.device | str) -> PackedMatrix:
        """The same matrix on a device."""
        return PackedMatrix(self.data.to(device), self.scales.to(device), self.i)

    def codes(self) -> Tensor:
        """The codes, [o, i] int8."""
        blocks = self.scales.shape[1]
        units = self.data.view(self.o, -1, 1, UNIT_BYTES)
        codes = torch.cat([units >> shift & 3 for shift in _SHIFTS], 2).to(torch.int8) - 1
        return codes.view(self.o, blocks, -1)[..., : self.i // blocks].reshape(self.o, self.i)


def pack_matrix(codes: Tensor, scales: Tensor) -> PackedMatrix:
    """Bring a ternary matrix into the layout of the kernels.

    Args:
        codes: [o, i] int8, in {-1, 0, 1}.
        scales: [R, C] float32; block (r, c) of the matrix, o / R rows by i / C columns, has scale (r, c).

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
    width = i // blocks
    stored = (F.pad(codes.reshape(o, blocks, width), (0, -width % UNIT)) + 1).to(torch.uint8)
    groups = stored.view(o, -1, len(_SHIFTS), UNIT_BYTES).unbind(2)
    data = groups[0] | groups[1] << 2 | groups[2] << 4 | groups[3] << 6
    expanded = scales.repeat_interleave(o // rows, 0).contiguous()
    return PackedMatrix(data.view(o, -1), expanded, i)
