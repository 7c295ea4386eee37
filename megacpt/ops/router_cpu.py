"""The compiled CPU kernel of the mixture-of-experts router; same functions as the reference.

Tokens are shared out among `torch.get_num_threads()` threads; the number changes no bit of the result.
"""

from __future__ import annotations

from ctypes import CDLL, byref, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from megacpt.ops.native import instruction_set, library
from megacpt.ops.router_reference import Routing, Scoring
from megacpt.ops.tensors import FORMATS, address


class CompiledRouter:
    """The functions of the library, bound to torch tensors.

    Args:
        functions: the loaded library.
        isa: the instruction set to use, an index of `native.INSTRUCTION_SETS`; all give the same bits.
    """

    def __init__(self, functions: CDLL, isa: int) -> None:
        self._isa = isa
        self._route = functions.megacpt_route
        self._gradient = functions.megacpt_route_gradient
        pointer, size = c_void_p, c_int64
        self._route.argtypes = [
            pointer, c_int, *[pointer] * 8, size, size, size, c_int, c_int, c_int, size, size, c_float, c_int, c_int,
        ]  # fmt: skip
        self._gradient.argtypes = [
            pointer, pointer, c_int, *[pointer] * 4, c_float, size, size, size, c_int, c_int, c_float, c_int, c_int,
        ]  # fmt: skip
        self._softmax_sums = functions.megacpt_softmax_sums
        self._softmax_sums.argtypes = [pointer, c_int, *[pointer] * 3, size, size, c_int, c_int]
        self._route.restype = self._gradient.restype = self._softmax_sums.restype = None
        self._sinkhorn, self._improve = functions.megacpt_sinkhorn, functions.megacpt_sinkhorn_improve
        self._sinkhorn.argtypes = [
            pointer, c_int, pointer, pointer, pointer, size, size, c_double, size, c_int, c_int,
        ]  # fmt: skip
        self._sinkhorn.restype = c_int64
        self._improve.argtypes, self._improve.restype = [pointer, pointer, size], c_double
        functions.megacpt_router_limit.restype = c_int64
        self.most_experts = int(functions.megacpt_router_limit(0))
        self.most_chosen = int(functions.megacpt_router_limit(1))

    def fits(self, experts: int, top_k: int) -> bool:
        """Whether the kernel's tables are large enough."""
        return experts <= self.most_experts and top_k <= self.most_chosen

    def route(self, logits: Tensor, bias: Tensor | None, mask: Tensor | None, scoring: Scoring) -> Routing:
        """See `router_reference.route`."""
        logits = logits.contiguous()
        tokens, width = logits.shape
        bias = None if bias is None else bias.float().contiguous()
        mask = None if mask is None else mask.contiguous()
        gates = torch.empty(tokens, scoring.top_k)
        experts = torch.empty(tokens, scoring.top_k, dtype=torch.int32)
        lse = torch.empty(tokens)
        counts, prob_sum, z_sum = (torch.zeros(size, dtype=torch.int64) for size in (width, width, 1))
        self._route(
            logits.data_ptr(), FORMATS[logits.dtype], address(bias), address(mask), gates.data_ptr(),
            experts.data_ptr(), lse.data_ptr(), counts.data_ptr(), prob_sum.data_ptr(), z_sum.data_ptr(), tokens, width,
            scoring.top_k, scoring.score == "sigmoid", scoring.renormalise, scoring.bias_on_logits, scoring.groups,
            scoring.groups_kept, scoring.scale, torch.get_num_threads(), self._isa,
        )  # fmt: skip
        return Routing(gates, experts, lse, counts, prob_sum, z_sum)

    def softmax_sums(self, logits: Tensor, log_u: Tensor, mask: Tensor | None) -> Tensor:
        """See `router_reference.softmax_sums`."""
        logits, log_u = logits.contiguous(), log_u.float().contiguous()
        mask = None if mask is None else mask.contiguous()
        sums = torch.empty(logits.shape[1], dtype=torch.int64)
        self._softmax_sums(
            logits.data_ptr(), FORMATS[logits.dtype], log_u.data_ptr(), address(mask), sums.data_ptr(), *logits.shape,
            torch.get_num_threads(), self._isa,
        )  # fmt: skip
        return sums

    def sinkhorn(
        self, logits: Tensor, log_u: Tensor, mask: Tensor | None, tolerance: float, most_iterations: int
    ) -> tuple[Tensor, int, float]:
        """All iterations of `megacpt.ops.sinkhorn` over the tokens of one rank, in one call; the bits of single ones.

        Args:
            logits: [T, E].
            log_u: [E] float64, where to start.
            mask: [T] bool, False for padding; None if there is none.
            tolerance: stop when the error is within it.
            most_iterations: stop then in any case.

        Returns:
            The bias, [E] float64; the number of iterations; the error in the last one.
        """
        logits, current = logits.contiguous(), log_u.clone(memory_format=torch.contiguous_format)
        mask, error = None if mask is None else mask.contiguous(), c_double()
        made = self._sinkhorn(
            logits.data_ptr(), FORMATS[logits.dtype], address(mask), current.data_ptr(), byref(error), *logits.shape,
            tolerance, most_iterations, torch.get_num_threads(), self._isa,
        )  # fmt: skip
        return current, int(made), error.value

    def improve(self, log_u: Tensor, load: Tensor) -> tuple[Tensor, float]:
        """See `megacpt.ops.sinkhorn.improved`."""
        moved, load = log_u.double().clone(memory_format=torch.contiguous_format), load.contiguous()
        return moved, float(self._improve(load.data_ptr(), moved.data_ptr(), len(load)))

    def gradient(
        self,
        logits: Tensor,
        lse: Tensor,
        experts: Tensor,
        grad_gates: Tensor,
        balance: Tensor,
        z: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """See `router_reference.gradient`."""
        logits, grad_gates, balance = logits.contiguous(), grad_gates.float().contiguous(), balance.float().contiguous()
        lse, experts = lse.contiguous(), experts.contiguous()
        tokens, width = logits.shape
        grad = torch.empty_like(logits)
        self._gradient(
            logits.data_ptr(), grad.data_ptr(), FORMATS[logits.dtype], lse.data_ptr(), experts.data_ptr(),
            grad_gates.data_ptr(), balance.data_ptr(), float(z), tokens, width, scoring.top_k,
            scoring.score == "sigmoid", scoring.renormalise, scoring.scale, torch.get_num_threads(), self._isa,
        )  # fmt: skip
        return grad


@cache
def load() -> CompiledRouter:
    """The kernel for this processor.

    Raises:
        SetupError: the library can't be had; says why.
    """
    return CompiledRouter(library(), instruction_set())
