"""The CUDA kernels of products with packed ternary matrices, for bfloat16 activations; functions of the reference.

Up to `MOST_TOKENS` tokens are multiplied with the matrix as it is packed, 64 at a time: that reads 2 bits a weight. For
more, the matrix is unpacked into codes in bfloat16, which are exact, cuBLAS multiplies, and scales are applied in
float32. Where to change over is an estimate for an H200 ([28672, 8192]: some 65 us for 64 tokens; unpacking, 123 us, is
made up for from about 250 tokens on) and was not measured.

Matrices are in tiles (`packed_matrix`). Sums of products are made in float32 in a fixed order without atomic additions:
the same bits every time.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL, POINTER, byref, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from megacpt.ops import packed_linear_reference
from megacpt.ops.native_cuda import current_stream, launched, library
from megacpt.ops.packed_linear_reference import Activations
from megacpt.ops.packed_matrix import TILE_COLUMNS, PackedMatrix

AT_ONCE = 64
MOST_TOKENS = 256
_ROW_BLOCKS = 1 << 14  # numbers of a workspace: rows / 128 fit
_CODES, _CODES8, _VALUES = range(3)


class CudaLinear:
    """The functions of the library, bound to torch tensors.

    Args:
        functions: the loaded library.
        stream: gives the handle of the stream to launch on, for a device.
    """

    def __init__(self, functions: CDLL, stream: Callable[[torch.device], int] = current_stream) -> None:
        self._stream = stream
        self._splits = functions.megacpt_cuda_packed_splits
        self._splits.argtypes = [c_int] * 4
        self._blocks = functions.megacpt_cuda_packed_blocks
        self._blocks.argtypes = [*[c_int] * 4, POINTER(c_int64)]
        self._product = functions.megacpt_cuda_packed_product
        self._product.argtypes = [*[c_void_p] * 6, *[c_int] * 5, c_void_p]
        self._unpack = functions.megacpt_cuda_unpack
        self._unpack.argtypes = [*[c_void_p] * 3, *[c_int] * 4, c_void_p]
        self._workspaces: dict[tuple[torch.device, int], Tensor] = {}

    def packed_linear(self, x: Tensor, matrix: PackedMatrix, activations: Activations) -> Tensor:
        """See `packed_linear_reference.packed_linear`, which runs for int8 and for widths that no kernel fits.

        Of matrices with several column blocks, more than `MOST_TOKENS` tokens see values rounded to bfloat16.
        """
        if not matrix.tiled:
            raise ValueError("the matrix is not in tiles: pack_matrix(codes, scales, tiled=True)")
        if activations == "fp8":
            return self._float8(x, matrix)
        width, groups = matrix.i, matrix.scales.shape[1]
        few = len(x) <= MOST_TOKENS and width % 8 == 0 and (groups == 1 or width % (groups * TILE_COLUMNS) == 0)
        if activations == "int8" or not (few or width % (16 * groups) == 0):
            return packed_linear_reference.packed_linear(x, matrix, activations)
        if not few:
            return self._dense(x, matrix)
        x = x.contiguous()
        x = x.clone() if x.data_ptr() % 16 else x
        out = x.new_empty(len(x), matrix.o)
        for first in range(0, len(x), AT_ONCE):
            self._few(x[first : first + AT_ONCE], matrix, out[first : first + AT_ONCE])
        return out

    def unpacked(self, matrix: PackedMatrix, form: int) -> Tensor:
        """The matrix [o, i]: codes in bfloat16 (0), in float8 e4m3 as uint8 (1), or values in bfloat16 (2)."""
        out = torch.empty(
            matrix.o, matrix.i, dtype=torch.uint8 if form == _CODES8 else torch.bfloat16, device=matrix.device
        )
        with launched(matrix.device) as check:
            check(
                self._unpack(
                    matrix.data.data_ptr(), matrix.scales.data_ptr(), out.data_ptr(), form, matrix.o, matrix.i,
                    matrix.scales.shape[1], self._stream(matrix.device),
                )
            )  # fmt: skip
        return out

    def _few(self, x: Tensor, matrix: PackedMatrix, out: Tensor) -> None:
        """At most 64 tokens, into `out`."""
        stream, shape = self._stream(x.device), (len(x), matrix.o, matrix.i, matrix.scales.shape[1])
        numbers = c_int64()
        with launched(x.device) as check:
            splits = self._splits(*shape)
            blocks = self._blocks(shape[0], shape[1], shape[3], splits, byref(numbers))
            if blocks > _ROW_BLOCKS:
                splits, numbers.value = 1, 0
            partial = x.new_empty(numbers.value, dtype=torch.float32)
            check(
                self._product(
                    matrix.data.data_ptr(), matrix.scales.data_ptr(), x.data_ptr(), out.data_ptr(),
                    partial.data_ptr(), self._workspace(x.device, stream).data_ptr(), *shape, splits, stream,
                )
            )  # fmt: skip

    def _dense(self, x: Tensor, matrix: PackedMatrix) -> Tensor:
        if matrix.scales.shape[1] > 1:
            return x @ self.unpacked(matrix, _VALUES).T
        return (_product(x, self.unpacked(matrix, _CODES)) * matrix.scales[:, 0]).to(x.dtype)

    def _float8(self, x: Tensor, matrix: PackedMatrix) -> Tensor:
        """Products of float8 for many tokens, where the device has them; codes are exact in float8, as in bfloat16."""
        rounded, scales = packed_linear_reference.float8(x)
        whole = matrix.scales.shape[1] == 1 and matrix.i % 16 == 0 and matrix.o % 16 == 0
        if len(x) <= MOST_TOKENS or not whole or not _has_float8(x.device):
            return (self.packed_linear(rounded.bfloat16(), matrix, "float") * scales).to(x.dtype)
        codes = self.unpacked(matrix, _CODES8).view(torch.float8_e4m3fn)
        rows = matrix.scales.T.contiguous()
        return torch._scaled_mm(rounded, codes.T, scale_a=scales, scale_b=rows, out_dtype=torch.bfloat16)

    def _workspace(self, device: torch.device, stream: int) -> Tensor:
        """Counters that every launch finds and leaves zero."""
        if (device, stream) not in self._workspaces:
            self._workspaces[device, stream] = torch.zeros(_ROW_BLOCKS, dtype=torch.int32, device=device)
        return self._workspaces[device, stream]


def _product(x: Tensor, codes: Tensor) -> Tensor:
    """The sums in float32, [T, o], which torch's product of bfloat16 gives on a GPU alone."""
    return torch.mm(x, codes.T, out_dtype=torch.float32) if x.is_cuda else x.float() @ codes.float().T


def _has_float8(device: torch.device) -> bool:
    """Whether a device multiplies numbers of float8 (torch does on the CPU)."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def load() -> CudaLinear:
    """The kernels of this device.

    Raises:
        SetupError: the library can't be had; says why.
    """
    return CudaLinear(library())
