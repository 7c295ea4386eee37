"""The compiled CPU kernels of ternary quantisation; same functions as the reference.

Work is shared out among `torch.get_num_threads()` threads; the number changes no bit of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, Array, Structure, c_int, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from megacpt.ops.native import instruction_set, library
from megacpt.ops.tensors import FORMATS, address
from megacpt.ops.ternarise_reference import Blocks, blocks_of


class Matrix(Structure):
    """A matrix of a list, as the kernels for CPU and CUDA take it (`TernaryMatrix` in C++)."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "out", "scales", "packed", "row_sums", "sums")),
        ("batch", c_int64),
        *((name, c_int32) for name in ("rows", "width", "halves", "row_blocks", "column_blocks", "aligned")),
    )


def matrix(weight: Tensor, blocks: Blocks, **pointers: Tensor | None) -> Matrix:
    """Describe a contiguous weight [..., o, i]; `pointers` are the tensors of the fields of their names."""
    addresses = {name: address(tensor) for name, tensor in pointers.items()}
    o, i = weight.shape[-2:]
    return Matrix(
        weight=weight.data_ptr(), batch=weight.shape[:-2].numel(), rows=o, width=i, halves=blocks.halves,
        row_blocks=blocks.rows, column_blocks=blocks.columns, **addresses,
    )  # fmt: skip


class CompiledTernary:
    """The functions of the library, bound to torch tensors.

    Args:
        functions: the loaded library.
        isa: the instruction set to use, an index of `native.INSTRUCTION_SETS`; all give the same bits.
    """

    def __init__(self, functions: CDLL, isa: int) -> None:
        self._isa = isa
        self._sums, self._ternarise = functions.megacpt_block_abs_sums, functions.megacpt_ternarise
        self._sums.argtypes = [c_void_p, *[c_int] * 4]
        self._ternarise.argtypes = [c_void_p, *[c_int] * 3, c_void_p, c_int, c_int]
        self._unpack = functions.megacpt_unpack_ternary
        self._unpack.argtypes = [c_void_p, *[c_int] * 4]
        self._sums.restype = self._ternarise.restype = self._unpack.restype = None

    def block_abs_sums(self, weights: Sequence[Tensor], blocks: Sequence[Blocks]) -> list[Tensor]:
        """See `megacpt.ops.ternarise.block_abs_sums`."""
        _kept, sums, listed = summed(weights, blocks)
        self._sums(listed, len(listed), FORMATS[weights[0].dtype], torch.get_num_threads(), self._isa)
        return sums

    def ternarise(
        self,
        weights: Sequence[Tensor],
        scales: Sequence[Tensor],
        outs: Sequence[Tensor] | None,
        halves: Sequence[int],
        packed: Sequence[Tensor] | None,
    ) -> Tensor:
        """See `megacpt.ops.ternarise.ternarise`."""
        kept, listed = quantised(weights, scales, outs, halves, packed)
        counts = torch.empty(len(listed), 2, dtype=torch.int64)
        self._ternarise(
            listed, len(listed), *formats(kept, outs), counts.data_ptr(),
            torch.get_num_threads(), self._isa,
        )  # fmt: skip
        return counts

    def unpack(self, kept: Tensor, scales: Tensor, out: Tensor, halves: int) -> None:
        """See `megacpt.ops.ternarise.unpack`."""
        scales = scales.contiguous()
        listed = array([matrix(out, blocks_of(scales, halves), scales=scales, out=out, packed=kept)])
        bytes_each = kept.dtype is not torch.uint8
        self._unpack(listed, bytes_each, FORMATS[out.dtype], torch.get_num_threads(), self._isa)


def summed(weights: Sequence[Tensor], blocks: Sequence[Blocks]) -> tuple[list[Tensor], list[Tensor], Array[Matrix]]:
    """The list for `block_abs_sums`, the tensors that must outlive it, and the sums by block, [..., R, C] float64."""
    kept, sums, listed = [], [], []
    for weight, at in zip(weights, blocks, strict=True):
        sums.append(weight.new_empty(*weight.shape[:-2], at.rows, at.columns, dtype=torch.float64))
        rows = weight.new_empty(*weight.shape[:-1], at.columns, dtype=torch.float64)
        kept += [weight.contiguous(), rows]
        listed.append(matrix(kept[-2], at, sums=sums[-1], row_sums=rows))
    return kept, sums, array(listed)


def quantised(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor] | None,
    halves: Sequence[int],
    packed: Sequence[Tensor] | None,
) -> tuple[list[Tensor], Array[Matrix]]:
    """The list for `ternarise`, and the tensors that must outlive it."""
    kept, listed = [], []
    for n, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        kept += [weight.contiguous(), scale.contiguous()]
        blocks = blocks_of(scale, halves[n])
        codes = None if packed is None else packed[n]
        listed.append(matrix(kept[-2], blocks, scales=kept[-1], out=None if outs is None else outs[n], packed=codes))
    return kept, array(listed)


def formats(weights: Sequence[Tensor], outs: Sequence[Tensor] | None) -> tuple[int, int]:
    """The numbers of the formats of weights and values; without values the latter says nothing."""
    return FORMATS[weights[0].dtype], FORMATS[(weights if outs is None else outs)[0].dtype]


def array(listed: Sequence[Matrix]) -> Array[Matrix]:
    """The list as C has it."""
    return (Matrix * len(listed))(*listed)


@cache
def load() -> CompiledTernary:
    """The kernels for this processor.

    Raises:
        SetupError: the library can't be had; says why.
    """
    return CompiledTernary(library(), instruction_set())
