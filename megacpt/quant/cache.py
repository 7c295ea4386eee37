"""What is kept of a quantised matrix between two updates of its latent weights: the matrix, or its codes alone.

``dense`` keeps the matrix as it is multiplied with; of grids other than ternary, or where packed codes are put in, the
codes too, to tell which changed. ``fp8`` keeps codes as float8 e4m3, ``2bit`` four of them a byte; the matrix is made
of them whenever one is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megacpt.ops.ternarise import unpack
from megacpt.ops.ternarise_reference import kept_codes, signs
from megacpt.quant.matrix import dense
from megacpt.quant.packing import changed_trits4, pack_trits4, unpack_trits4
from megacpt.quant.scales import Blocks

if TYPE_CHECKING:
    from megacpt.config.quantise import CacheForm

_FP8 = torch.float8_e4m3fn


class Cache:
    """A quantised matrix [.., o, i] in one of three forms, all of which give the same matrix.

    Args:
        form: ``dense``, ``fp8`` or ``2bit``.
        dtype: of the matrix.
        blocks: of the matrix.
        transform: length of the transform of its rows; 1 for none.

    Attributes:
        filled: whether there is anything.
    """

    def __init__(self, form: CacheForm, dtype: torch.dtype, blocks: Blocks, transform: int) -> None:
        self.form, self.dtype = form, dtype
        self.blocks, self.transform = blocks, transform
        self.filled = False
        self._codes: Tensor | None = None  # [.., o, i] int8 or float8 e4m3, or packed [.., o, ceil(i / 4)] uint8
        self._scales: Tensor | None = None
        self._matrix: Tensor | None = None
        self._width = 0

    @property
    def lasting(self) -> bool:
        """Whether `matrix` gives the same memory every time."""
        return self.form == "dense"

    def put(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Take codes [.., o, i] int8 and scales [.., R, C] float32.

        Returns:
            [] int64, how many codes differ from those before.
        """
        kept = codes
        if self.form == "fp8":
            kept = codes.to(_FP8)
        elif self.form == "2bit":
            kept = pack_trits4(codes)
        return self._take(kept, scales, codes.shape[-1])

    def put_packed(self, packed: Tensor, scales: Tensor, width: int) -> Tensor:
        """As `put`, of codes [.., o, ceil(i / 4)] as `pack_trits4` packs them; `width` is i."""
        return self._take(_in_bytes(unpack_trits4(packed, width)) if self.form == "fp8" else packed, scales, width)

    def memory(self, like: Tensor) -> Tensor:
        """The memory of the dense matrix [.., o, i], for who writes the matrix without its codes."""
        if self._matrix is None:
            self._matrix = torch.zeros_like(like, dtype=self.dtype, memory_format=torch.contiguous_format)
        self._codes, self._width, self.filled = None, like.shape[-1], True
        return self._matrix

    def codes(self) -> Tensor:
        """[.., o, i] int8."""
        if self._codes is None:
            assert self._matrix is not None
            return signs(self._matrix)
        return self._codes if self._codes.dtype is torch.int8 else kept_codes(self._codes, self._width)

    def matrix(self) -> Tensor:
        """[.., o, i] in the dtype of the matrix."""
        if self._matrix is not None:
            return self._matrix
        return self._made(None)

    def _take(self, kept: Tensor, scales: Tensor, width: int) -> Tensor:
        """Keep codes in the form that is kept; return how many differ from those before."""
        flips = torch.zeros((), dtype=torch.int64, device=kept.device)
        if self.filled:
            flips = _differences(pack_trits4(self.codes()) if self._codes is None else self._codes, kept)
        self._codes, self._scales, self._width, self.filled = kept, scales, width, True
        if self.lasting:
            self._matrix = self._made(self._matrix)
        return flips

    def _made(self, out: Tensor | None) -> Tensor:
        """The matrix, in the memory of `out` where there is any."""
        kept, scales, blocks = self._codes, self._scales, self.blocks
        assert kept is not None
        assert scales is not None
        if out is None:
            out = torch.empty(*kept.shape[:-1], self._width, dtype=self.dtype, device=kept.device)
        if kept.dtype is torch.int8 or self.transform > 1:
            codes = blocks.view(self.codes())
            dense(codes, blocks.spread(scales), self.transform, self.dtype, blocks.view(out))
        else:
            unpack(kept, scales, out, blocks.halves)
        return out


def _differences(kept: Tensor, other: Tensor) -> Tensor:
    """How many codes differ, of two tensors that keep them in the same way."""
    if kept.dtype is torch.uint8:
        return changed_trits4(kept, other)
    return torch.count_nonzero(kept.view(torch.int8) != other.view(torch.int8))


def _in_bytes(codes: Tensor) -> Tensor:
    """Ternary codes in float8 e4m3, where 1 is 0x38: by their bits, as torch converts one after the other."""
    return ((codes & 1) * 0x38 | codes & -128).view(_FP8)
