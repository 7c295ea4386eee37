"""What is kept of a quantised matrix between two updates of its latent weights: the matrix, or its codes alone.

``dense`` keeps the matrix as it is multiplied with, and its codes (one byte) to tell which changed. ``fp8`` keeps codes
as float8 e4m3, ``2bit`` four of them a byte; the matrix is made of them whenever one is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megacpt.quant.matrix import dense
from megacpt.quant.packing import pack_trits4, unpack_trits4
from megacpt.quant.scales import Blocks

if TYPE_CHECKING:
    from megacpt.config.quantise import CacheForm


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
        self._codes: Tensor | None = None
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
        flips = torch.count_nonzero(codes != self.codes()) if self.filled else codes.new_zeros((), dtype=torch.int64)
        self._scales, self._width, self.filled = scales, codes.shape[-1], True
        if self.form == "fp8":
            codes = codes.to(torch.float8_e4m3fn)
        elif self.form == "2bit":
            codes = pack_trits4(codes)
        self._codes = codes
        if self.lasting:
            self._matrix = self._made(self._matrix)
        return flips

    def memory(self, like: Tensor) -> Tensor:
        """The memory of the dense matrix [.., o, i], for who writes the matrix without its codes."""
        if self._matrix is None:
            self._matrix = torch.zeros_like(like, dtype=self.dtype, memory_format=torch.contiguous_format)
        self.filled = True
        return self._matrix

    def codes(self) -> Tensor:
        """[.., o, i] int8."""
        assert self._codes is not None
        if self.form == "2bit":
            return unpack_trits4(self._codes, self._width)
        return self._codes.to(torch.int8)

    def matrix(self) -> Tensor:
        """[.., o, i] in the dtype of the matrix."""
        if self._matrix is not None:
            return self._matrix
        return self._made(None)

    def _made(self, out: Tensor | None) -> Tensor:
        """The matrix, in the memory of `out` where there is any."""
        assert self._scales is not None
        codes, blocks = self.codes(), self.blocks
        place = None if out is None else blocks.view(out)
        made = dense(blocks.view(codes), blocks.spread(self._scales), self.transform, self.dtype, place)
        return made.view(codes.shape) if out is None else out
