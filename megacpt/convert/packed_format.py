"""The forms in which a packed folder keeps codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacpt.config import QuantiseConfig
from megacpt.errors import ConfigError
from megacpt.quant import packing

TERNARY = {"2": "ternary-2bit", "1.6": "ternary-1.6bit"}


@dataclass(frozen=True)
class PackedFormat:
    """Codes in bytes, row by row.

    Attributes:
        name: in config.json.
        bits: of a code in a whole byte.
        lowest: the lowest code; unsigned ones count from it.
        step: from a code to the next.
    """

    name: str
    bits: float
    lowest: int = -1
    step: int = 1

    @property
    def has_product(self) -> bool:
        """Whether `megacpt.ops.packed_linear` multiplies by such codes: those of -1, 0 and 1."""
        return self.lowest == -1

    def pack(self, codes: Tensor) -> Tensor:
        """Pack codes [o, i] int8 to [o, `row_bytes`] uint8."""
        if self.name == TERNARY["2"]:
            return packing.pack_trits4(codes)
        if self.name == TERNARY["1.6"]:
            return packing.pack_trits5(codes)
        unsigned = (codes.to(torch.int16) - self.lowest).div_(self.step, rounding_mode="floor")
        return packing.pack_bits(unsigned.to(torch.uint8), int(self.bits))

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """Return the codes [o, columns] int8."""
        if self.name == TERNARY["2"]:
            return packing.unpack_trits4(packed, columns)
        if self.name == TERNARY["1.6"]:
            return packing.unpack_trits5(packed, columns)
        unsigned = packing.unpack_bits(packed, int(self.bits), columns).to(torch.int16)
        return unsigned.mul_(self.step).add_(self.lowest).to(torch.int8)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many codes."""
        if self.name in TERNARY.values():
            return -(-columns // round(8 / self.bits))
        return -(-columns * int(self.bits) // 8)


FORMATS = {
    found.name: found
    for found in (
        PackedFormat(TERNARY["2"], 2),
        PackedFormat(TERNARY["1.6"], 1.6),
        PackedFormat("binary-1bit", 1, step=2),
        *(PackedFormat(f"int-{bits}bit", bits, lowest=-(2 ** (bits - 1) - 1)) for bits in range(2, 9)),
    )
}


def format_of(config: QuantiseConfig, bits: str | None) -> PackedFormat:
    """Return the form for a grid.

    Args:
        config: the grid.
        bits: of a ternary code, ``2`` or ``1.6``; None for 2, and for grids that leave no choice.

    Raises:
        ConfigError: the grid has no packed form, or not one of so many bits.
    """
    if config.grid == "ternary":
        if (bits or "2") not in TERNARY:
            raise ConfigError(f"--bits {bits}: ternary weights are packed in 2 bits (four a byte) or 1.6 (five a byte)")
        return FORMATS[TERNARY[bits or "2"]]
    if config.grid == "quest":
        raise ConfigError("model.quantise.grid: quest weights lie on their grid after a transform, and are not packed")
    found = FORMATS["binary-1bit" if config.grid == "binary" else f"int-{config.bits}bit"]
    if bits is not None and float(bits) != found.bits:
        raise ConfigError(
            f"--bits {bits}: the weights are on the grid {config.grid}, whose codes take {found.bits} bits"
        )
    return found
