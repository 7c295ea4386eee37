"""The compiled CPU kernels of products with packed ternary and with 16-bit matrices; same functions as the reference.

Rows of the matrix are shared out among `torch.get_num_threads()` threads; the number changes no bit of the result.
"""

from __future__ import annotations

from ctypes import CDLL, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from megacpt.ops import packed_linear_reference
from megacpt.ops.native import INSTRUCTION_SETS, library
from megacpt.ops.packed_linear_reference import Activations
from megacpt.ops.packed_matrix import PackedMatrix
from megacpt.ops.tensors import FORMATS

VARIANTS = (*INSTRUCTION_SETS, "avx512vnni")  # by the number of `megacpt_packed_instruction_set`


class CompiledLinear:
    """The functions of the library, bound to torch tensors.

    Args:
        functions: the loaded library.
        isa: the instruction set to use, an index of `VARIANTS`; all give the same bits.
    """

    def __init__(self, functions: CDLL, isa: int) -> None:
        self._isa = isa
        self._packed, self._half = functions.megacpt_packed_linear, functions.megacpt_half_linear
        pointer, size = c_void_p, c_int64
        self._packed.argtypes = [pointer, c_int, c_int, pointer, pointer, pointer, *[size] * 4, c_int, c_int]
        self._half.argtypes = [pointer, pointer, c_int, pointer, *[size] * 3, c_int, c_int]
        self._packed.restype = self._half.restype = None

    def packed_linear(self, x: Tensor, matrix: PackedMatrix, activations: Activations) -> Tensor:
        """See `packed_linear_reference.packed_linear`."""
        if matrix.tiled:
            raise ValueError("the matrix is in the tiles of CUDA's kernels: pack_matrix(codes, scales) on the CPU")
        if activations == "fp8":
            rounded, scales = packed_linear_reference.float8(x)
            return (self.packed_linear(rounded.float(), matrix, "float") * scales).to(x.dtype)
        x = x.contiguous()
        out = torch.empty(x.shape[0], matrix.o)
        self._packed(
            x.data_ptr(), FORMATS[x.dtype], activations == "int8", matrix.data.data_ptr(), matrix.scales.data_ptr(),
            out.data_ptr(), x.shape[0], matrix.o, matrix.i, matrix.scales.shape[1], torch.get_num_threads(), self._isa,
        )  # fmt: skip
        return out.to(x.dtype)

    def half_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `packed_linear_reference.half_linear`."""
        x, weight = x.contiguous(), weight.contiguous()
        out = torch.empty(x.shape[0], weight.shape[0])
        self._half(
            x.data_ptr(), weight.data_ptr(), FORMATS[weight.dtype], out.data_ptr(), x.shape[0], *weight.shape,
            torch.get_num_threads(), self._isa,
        )  # fmt: skip
        return out


def best_variant() -> int:
    """The best of `VARIANTS` that this processor has.

    Raises:
        SetupError: the library can't be had; says why.
    """
    return int(library().megacpt_packed_instruction_set())


@cache
def load() -> CompiledLinear:
    """The kernels for this processor.

    Raises:
        SetupError: the library can't be had; says why.
    """
    return CompiledLinear(library(), best_variant())
