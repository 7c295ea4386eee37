"""The compiled CPU kernels of sorting tokens by expert and back; same functions as the reference.

Work is shared out among `torch.get_num_threads()` threads; the number changes no bit of the result.
"""

from __future__ import annotations

from ctypes import CDLL, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from megacpt.ops.native import instruction_set, library
from megacpt.ops.tensors import FORMATS


class CompiledOrder:
    """The functions of the library, bound to torch tensors.

    Args:
        functions: the loaded library.
        isa: the instruction set to use, an index of `native.INSTRUCTION_SETS`; all give the same bits.
    """

    def __init__(self, functions: CDLL, isa: int) -> None:
        self._isa = isa
        pointer, size = c_void_p, c_int64
        self._sort = functions.megacpt_moe_sort
        self._sort.argtypes = [pointer, size, size, pointer, pointer, pointer, c_int]
        self._gather = functions.megacpt_gather_tokens
        self._gather.argtypes = [pointer, pointer, pointer, size, size, size, size, c_int]
        self._combine = functions.megacpt_combine_tokens
        self._combine.argtypes = [pointer, c_int, *[pointer] * 3, size, size, size, c_int, c_int]
        self._gradient = functions.megacpt_combine_gradient
        self._gradient.argtypes = [pointer, pointer, c_int, *[pointer] * 4, size, size, size, size, c_int, c_int]
        for function in (self._sort, self._gather, self._combine, self._gradient):
            function.restype = None

    def sort(self, experts: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `expert_order_reference.sort`."""
        experts = experts.contiguous()
        perm, inverse = torch.empty(experts.numel(), dtype=torch.int32), torch.empty_like(experts)
        counts = torch.empty(width, dtype=torch.int64)
        self._sort(
            experts.data_ptr(), experts.numel(), width, perm.data_ptr(), inverse.data_ptr(), counts.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return perm, inverse, counts

    def gather(self, tokens: Tensor, perm: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:
        """See `expert_order_reference.gather`."""
        tokens, inverse = tokens.contiguous(), inverse.contiguous()
        rows = tokens.new_empty(len(perm), tokens.shape[1])
        self._gather(
            tokens.data_ptr(), inverse.data_ptr(), rows.data_ptr(), *inverse.shape,
            tokens.shape[1] * tokens.element_size(), int(counts.sum()), torch.get_num_threads(),
        )  # fmt: skip
        return rows

    def combine(self, rows: Tensor, inverse: Tensor, gates: Tensor | None) -> Tensor:
        """See `expert_order_reference.combine`."""
        rows, inverse = rows.contiguous(), inverse.contiguous()
        gates = None if gates is None else gates.float().contiguous()
        out = rows.new_empty(inverse.shape[0], rows.shape[1])
        self._combine(
            rows.data_ptr(), FORMATS[rows.dtype], inverse.data_ptr(), None if gates is None else gates.data_ptr(),
            out.data_ptr(), *inverse.shape, rows.shape[1], torch.get_num_threads(), self._isa,
        )  # fmt: skip
        return out

    def combine_gradient(
        self, grad: Tensor, rows: Tensor, perm: Tensor, inverse: Tensor, counts: Tensor, gates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `expert_order_reference.combine_gradient`."""
        del perm
        grad, rows, inverse = grad.to(rows.dtype).contiguous(), rows.contiguous(), inverse.contiguous()
        weights = gates.float().contiguous()
        grad_rows, grad_gates = torch.empty_like(rows), torch.empty_like(weights)
        self._gradient(
            grad.data_ptr(), rows.data_ptr(), FORMATS[rows.dtype], inverse.data_ptr(), weights.data_ptr(),
            grad_rows.data_ptr(), grad_gates.data_ptr(), *inverse.shape, rows.shape[1], int(counts.sum()),
            torch.get_num_threads(), self._isa,
        )  # fmt: skip
        return grad_rows, grad_gates.to(gates.dtype)


@cache
def load() -> CompiledOrder:
    """The kernels for this processor.

    Raises:
        SetupError: the library can't be had; says why.
    """
    return CompiledOrder(library(), instruction_set())
