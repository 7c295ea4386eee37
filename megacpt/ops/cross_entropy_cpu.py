"""The compiled CPU kernel of the vocabulary-parallel cross entropy; same functions as the reference.

Rows are shared out among `torch.get_num_threads()` threads; the number changes no bit of the result.
"""

from __future__ import annotations

from ctypes import CDLL, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from megacpt.ops.native import instruction_set, library

DTYPES = frozenset((torch.float32, torch.bfloat16))


class CompiledCrossEntropy:
    """The two functions of the library, bound to torch tensors.

    Args:
        functions: the loaded library.
        isa: the instruction set to use, an index of `native.INSTRUCTION_SETS`; all give the same bits.
    """

    def __init__(self, functions: CDLL, isa: int) -> None:
        self._isa = isa
        self._partials = functions.megacpt_cross_entropy_partials
        self._gradient = functions.megacpt_cross_entropy_gradient
        sizes = [c_int64, c_int64, c_int64, c_int, c_int]  # rows, columns, vocab_start, threads, instruction set
        self._partials.argtypes = [c_void_p, c_int, *[c_void_p] * 4, *sizes]
        self._gradient.argtypes = [c_void_p, c_void_p, c_int, *[c_void_p] * 4, *sizes]
        self._partials.restype = self._gradient.restype = None

    def partials(self, logits: Tensor, target: Tensor, vocab_start: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `cross_entropy_reference.partials`."""
        logits, target = logits.contiguous(), target.contiguous()
        rows, width = logits.shape
        row_max, sum_exp, target_logit = (torch.empty(rows, dtype=torch.float32) for _ in range(3))
        self._partials(
            logits.data_ptr(), logits.dtype is torch.bfloat16, target.data_ptr(), row_max.data_ptr(),
            sum_exp.data_ptr(), target_logit.data_ptr(), rows, width, vocab_start, torch.get_num_threads(), self._isa,
        )  # fmt: skip
        return row_max, sum_exp, target_logit

    def gradient(
        self,
        logits: Tensor,
        target: Tensor,
        row_max: Tensor,
        sum_exp: Tensor,
        grad_loss: Tensor,
        vocab_start: int,
        out: Tensor,
    ) -> None:
        """See `cross_entropy_reference.gradient`."""
        source, target = logits.contiguous(), target.contiguous()
        row_max, sum_exp, grad_loss = row_max.contiguous(), sum_exp.contiguous(), grad_loss.contiguous()
        rows, width = logits.shape
        written = out if out.is_contiguous() else torch.empty_like(source)
        self._gradient(
            source.data_ptr(), written.data_ptr(), logits.dtype is torch.bfloat16, target.data_ptr(),
            row_max.data_ptr(), sum_exp.data_ptr(), grad_loss.data_ptr(), rows, width, vocab_start,
            torch.get_num_threads(), self._isa,
        )  # fmt: skip
        if written is not out:
            out.copy_(written)


@cache
def load() -> CompiledCrossEntropy:
    """The kernel for this processor.

    Raises:
        SetupError: the library can't be had; says why.
    """
    return CompiledCrossEntropy(library(), instruction_set())
