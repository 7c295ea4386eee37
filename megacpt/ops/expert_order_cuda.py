"""The CUDA kernels that sort tokens by expert; same functions as the reference.

A stable counting sort in three launches, and rows that one block each writes in a fixed order: no atomic addition, the
same bits every time. No call waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from megacpt.ops import expert_order_reference
from megacpt.ops.native_cuda import current_stream, launched, library
from megacpt.ops.tensors import FORMATS

_POINTER = c_void_p


class CudaOrder:
    """The functions of the library, bound to torch tensors.

    Args:
        functions: the loaded library.
        stream: gives the handle of the stream to launch on, for a device.
    """

    def __init__(self, functions: CDLL, stream: Callable[[torch.device], int] = current_stream) -> None:
        self._stream = stream
        self._most_experts = int(functions.megacpt_cuda_router_limit(0))
        self._tiles = functions.megacpt_cuda_sort_tiles
        self._tiles.argtypes = [c_int64]
        self._sort = functions.megacpt_cuda_moe_sort
        self._sort.argtypes = [_POINTER, c_int64, c_int, *[_POINTER] * 5]
        self._gather = functions.megacpt_cuda_gather
        self._gather.argtypes = [_POINTER, c_int, *[_POINTER] * 3, c_int64, c_int64, c_int, _POINTER]
        self._combine = functions.megacpt_cuda_combine
        self._combine.argtypes = [_POINTER, c_int, *[_POINTER] * 3, c_int64, c_int64, c_int, _POINTER]
        self._combine_gradient = functions.megacpt_cuda_combine_gradient
        self._combine_gradient.argtypes = [
            _POINTER, _POINTER, c_int, *[_POINTER] * 5, c_int64, c_int64, c_int, _POINTER,
        ]  # fmt: skip

    def sort(self, experts: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `expert_order_reference.sort`, which runs for more experts than the kernel is compiled for."""
        if width > self._most_experts:
            return expert_order_reference.sort(experts, width)
        experts = experts.contiguous()
        slots = experts.numel()
        table = experts.new_empty((width + 1) * (self._tiles(slots) + 1))
        perm, inverse = experts.new_empty(slots), torch.empty_like(experts)
        counts = experts.new_empty(width, dtype=torch.int64)
        with launched(experts.device) as check:
            check(
                self._sort(
                    experts.data_ptr(), slots, width, table.data_ptr(), perm.data_ptr(), inverse.data_ptr(),
                    counts.data_ptr(), self._stream(experts.device),
                )
            )  # fmt: skip
        return perm, inverse, counts

    def gather(self, tokens: Tensor, perm: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:  # noqa: ARG002
        """See `expert_order_reference.gather`."""
        tokens, perm, inverse = tokens.contiguous(), perm.contiguous(), inverse.contiguous()
        rows = tokens.new_empty(len(perm), tokens.shape[1])
        with launched(tokens.device) as check:
            check(
                self._gather(
                    tokens.data_ptr(), FORMATS[tokens.dtype], perm.data_ptr(), inverse.data_ptr(), rows.data_ptr(),
                    *rows.shape, inverse.shape[1], self._stream(tokens.device),
                )
            )  # fmt: skip
        return rows

    def combine(self, rows: Tensor, inverse: Tensor, gates: Tensor | None) -> Tensor:
        """See `expert_order_reference.combine`."""
        rows, inverse = rows.contiguous(), inverse.contiguous()
        gates = None if gates is None else gates.float().contiguous()
        out = rows.new_empty(len(inverse), rows.shape[1])
        with launched(rows.device) as check:
            check(
                self._combine(
                    rows.data_ptr(), FORMATS[rows.dtype], inverse.data_ptr(),
                    None if gates is None else gates.data_ptr(), out.data_ptr(), *out.shape, inverse.shape[1],
                    self._stream(rows.device),
                )
            )  # fmt: skip
        return out

    def combine_gradient(
        self,
        grad: Tensor,
        rows: Tensor,
        perm: Tensor,
        inverse: Tensor,
        counts: Tensor,  # noqa: ARG002
        gates: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `expert_order_reference.combine_gradient`."""
        grad, rows, perm, inverse = grad.contiguous(), rows.contiguous(), perm.contiguous(), inverse.contiguous()
        weights = gates.float().contiguous()
        grad_rows, grad_gates = torch.empty_like(rows), torch.empty_like(weights)
        with launched(rows.device) as check:
            check(
                self._combine_gradient(
                    grad.data_ptr(), rows.data_ptr(), FORMATS[rows.dtype], perm.data_ptr(), inverse.data_ptr(),
                    weights.data_ptr(), grad_rows.data_ptr(), grad_gates.data_ptr(), *rows.shape, inverse.shape[1],
                    self._stream(rows.device),
                )
            )  # fmt: skip
        return grad_rows, grad_gates.to(gates.dtype)


@cache
def load() -> CudaOrder:
    """The kernels of this device.

    Raises:
        SetupError: the library can't be had; says why.
    """
    return CudaOrder(library())
