"""The CUDA kernels of ternary quantisation; same functions as the reference.

All matrices of a list share a launch (one for each 40 of them), on torch's current stream, which the host does not wait
for. Sums have the order of the definition, and counts are integers: the same bits every time and as on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import CDLL, c_int, c_void_p
from functools import cache

import torch
from torch import Tensor

from megacpt.ops import ternarise_reference
from megacpt.ops.native_cuda import current_stream, launched, library
from megacpt.ops.tensors import FORMATS
from megacpt.ops.ternarise_cpu import formats, quantised, summed
from megacpt.ops.ternarise_reference import Blocks


class CudaTernary:
    """The functions of the library, bound to torch tensors.

    Args:
        functions: the loaded library.
        stream: gives the handle of the stream to launch on, for a device.
    """

    def __init__(self, functions: CDLL, stream: Callable[[torch.device], int] = current_stream) -> None:
        self._stream = stream
        self._sums = functions.megacpt_cuda_block_abs_sums
        self._sums.argtypes = [c_void_p, c_int, c_int, c_void_p]
        self._ternarise = functions.megacpt_cuda_ternarise
        self._ternarise.argtypes = [c_void_p, c_int, c_int, c_int, c_void_p, c_void_p]

    def block_abs_sums(self, weights: Sequence[Tensor], blocks: Sequence[Blocks]) -> list[Tensor]:
        """See `megacpt.ops.ternarise.block_abs_sums`."""
        _kept, sums, listed = summed(weights, blocks)
        device = weights[0].device
        with launched(device) as check:
            check(self._sums(listed, len(listed), FORMATS[weights[0].dtype], self._stream(device)))
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
        if outs is None:
            return self._codes_alone(weights, scales, halves, packed or [])
        kept, listed = quantised(weights, scales, outs, halves, packed)
        device = weights[0].device
        counts = torch.zeros(len(listed), 2, dtype=torch.int64, device=device)
        with launched(device) as check:
            check(self._ternarise(listed, len(listed), *formats(kept, outs), counts.data_ptr(), self._stream(device)))
        return counts

    def unpack(self, kept: Tensor, scales: Tensor, out: Tensor, halves: int) -> None:
        """See `megacpt.ops.ternarise.unpack`: torch's gather from a table of codes."""
        ternarise_reference.unpack(kept, scales, out, halves)

    def _codes_alone(
        self, weights: Sequence[Tensor], scales: Sequence[Tensor], halves: Sequence[int], packed: Sequence[Tensor]
    ) -> Tensor:
        """The values of one matrix at a time go to memory that is freed again: the kernel always writes them."""
        counts = []
        for weight, scale, half, codes in zip(weights, scales, halves, packed, strict=True):
            values = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            counts.append(self.ternarise([weight], [scale], [values], [half], [codes]))
        return torch.cat(counts)


@cache
def load() -> CudaTernary:
    """The kernels of this device.

    Raises:
        SetupError: the library can't be had; says why.
    """
    return CudaTernary(library())
