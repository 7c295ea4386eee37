"""The CUDA kernels of products with packed ternary matrices, for bfloat16 activations; functions of the reference.

Up to `MOST_TOKENS` tokens are multiplied with the matrix as it is packed, 64 at a time: that reads 2 bits a weight. For
more, the matrix is unpacked into codes in bfloat16, which are exact, cuBLAS multiplies, and scales are applied in
float32. Where to change over is an estimate for an H200 ([28672, 8192]: some 65 us for 64 tokens; unpacking, 123 us, is
made up for from about 250 tokens on) and was not measured.

The kernels have a layout of their own, tiles of tensor cores, which is made when a matrix is first used and kept while
it lives. Sums of products are made in float32 in a fixed order without atomic additions: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL, POINTER, byref, c_int, c_int64, c_void_p
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megacpt.ops import packed_linear_reference
from megacpt.ops.native_cuda import current_stream, launched, library
from megacpt.ops.packed_linear_reference import Activations
from megacpt.ops.packed_matrix import PackedMatrix

TILE_ROWS, TILE_COLUMNS = 16, 128
AT_ONCE = 64
MOST_TOKENS = 256
_ROW_BLOCKS = 1 << 14  # numbers of a workspace: rows / 128 fit
_CODES, _CODES8, _VALUES = range(3)
_LARGEST8 = 448.0  # of float8 e4m3


def tiles(codes: Tensor) -> Tensor:
    """Bring codes into the order in which the threads of a warp feed them to tensor cores.

    A tile is 16 rows by 128 columns; of it, thread 4 g + t has four words: rows g and g + 8 of its first 64 columns,
    then of its last. A word holds the 16 columns from 16 t on: column 2 p + e has the bits 15 - 2 p and 14 - 2 p of
    half e, which are 00 for 0, 01 for 1 and 11 for -1.

    Args:
        codes: [o, i] int8, in {-1, 0, 1}.

    Returns:
        [ceil(o / 16), ceil(i / 128), 32, 4] int32.
    """
    o, i = codes.shape
    fields = F.pad(codes, (0, -i % TILE_COLUMNS, 0, -o % TILE_ROWS)) & 3
    view = fields.view(-(-o // TILE_ROWS), 2, 8, -(-i // TILE_COLUMNS), 2, 4, 8, 2)
    words = torch.zeros(view.shape[:-2], dtype=torch.int32, device=codes.device)
    for p in range(8):
        for e in range(2):
            words |= view[..., p, e].int() << (16 * e + 14 - 2 * p)
    return words.permute(0, 3, 2, 5, 4, 1).reshape(words.shape[0], words.shape[3], 32, 4)


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
        self._tiles = WeakTensorKeyDictionary()
        self._workspaces: dict[tuple[torch.device, int], Tensor] = {}

    def packed_linear(self, x: Tensor, matrix: PackedMatrix, activations: Activations) -> Tensor:
        """See `packed_linear_reference.packed_linear`, which runs for int8 and for widths that no kernel fits.

        Of matrices with several column blocks, more than `MOST_TOKENS` tokens see values rounded to bfloat16.
        """
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

    def float8_linear(self, x: Tensor, matrix: PackedMatrix) -> Tensor:
        """Multiply activations rounded to float8 e4m3 by codes, which are exact in it, on a device with such products.

        Args:
            x: [T, i] bfloat16; each token is scaled so that its largest magnitude becomes 448.
            matrix: [o, i] with one column block, o and i divisible by 16.

        Returns:
            [T, o] bfloat16; both scales are applied to the float32 sums.
        """
        largest = x.abs().amax(1, keepdim=True).float().clamp(min=2.0**-100)
        rounded = (x.float() * (_LARGEST8 / largest)).to(torch.float8_e4m3fn)
        codes = self.unpacked(matrix, _CODES8).view(torch.float8_e4m3fn)
        return torch._scaled_mm(
            rounded,
            codes.T,
            scale_a=largest / _LARGEST8,
            scale_b=matrix.scales.T.contiguous(),
            out_dtype=torch.bfloat16,
        )

    def unpacked(self, matrix: PackedMatrix, form: int) -> Tensor:
        """The matrix [o, i]: codes in bfloat16 (0), in float8 e4m3 as uint8 (1), or values in bfloat16 (2)."""
        out = torch.empty(
            matrix.o, matrix.i, dtype=torch.uint8 if form == _CODES8 else torch.bfloat16, device=matrix.device
        )
        with launched(matrix.device) as check:
            check(
                self._unpack(
                    self._tiled(matrix).data_ptr(), matrix.scales.data_ptr(), out.data_ptr(), form, matrix.o, matrix.i,
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
                    self._tiled(matrix).data_ptr(), matrix.scales.data_ptr(), x.data_ptr(), out.data_ptr(),
                    partial.data_ptr(), self._workspace(x.device, stream).data_ptr(), *shape, splits, stream,
                )
            )  # fmt: skip

    def _dense(self, x: Tensor, matrix: PackedMatrix) -> Tensor:
        if matrix.scales.shape[1] > 1:
            return x @ self.unpacked(matrix, _VALUES).T
        return (_product(x, self.unpacked(matrix, _CODES)) * matrix.scales[:, 0]).to(x.dtype)

    def _tiled(self, matrix: PackedMatrix) -> Tensor:
        if matrix.data not in self._tiles:
            self._tiles[matrix.data] = tiles(matrix.codes())
        found: Tensor = self._tiles[matrix.data]
        return found

    def _workspace(self, device: torch.device, stream: int) -> Tensor:
        """Counters that every launch finds and leaves zero."""
        if (device, stream) not in self._workspaces:
            self._workspaces[device, stream] = torch.zeros(_ROW_BLOCKS, dtype=torch.int32, device=device)
        return self._workspaces[device, stream]


def _product(x: Tensor, codes: Tensor) -> Tensor:
    """The sums in float32, [T, o], which torch's product of bfloat16 gives on a GPU alone."""
    return torch.mm(x, codes.T, out_dtype=torch.float32) if x.is_cuda else x.float() @ codes.float().T


@cache
def load() -> CudaLinear:
    """The kernels of this device.

    Raises:
        SetupError: the library can't be had; says why.
    """
    return CudaLinear(library())
