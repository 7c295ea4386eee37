"""The CUDA kernels of the mixture-of-experts router; same functions as the reference.

Each call is one launch on torch's current stream, which the host does not wait for (`sinkhorn` apart). Sums over tokens
are gathered in a workspace of the stream, which the launch itself leaves as it found it: zero.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from megacpt.ops.native_cuda import current_stream, launched, library
from megacpt.ops.router_reference import Routing, Scoring
from megacpt.ops.tensors import FORMATS, address

_POINTER = c_void_p


class CudaRouter:
    """The functions of the library, bound to torch tensors.

    Args:
        functions: the loaded library.
        stream: gives the handle of the stream to launch on, for a device.
    """

    def __init__(self, functions: CDLL, stream: Callable[[torch.device], int] = current_stream) -> None:
        self._stream = stream
        self._route = functions.megacpt_cuda_route
        self._gradient = functions.megacpt_cuda_route_gradient
        self._softmax_sums = functions.megacpt_cuda_softmax_sums
        self._route.argtypes = [_POINTER, c_int, *[_POINTER] * 9, c_int64, *[c_int] * 7, c_float, _POINTER]
        self._gradient.argtypes = [
            _POINTER, _POINTER, c_int, *[_POINTER] * 5, c_int64, *[c_int] * 4, c_float, _POINTER,
        ]  # fmt: skip
        self._softmax_sums.argtypes = [_POINTER, c_int, *[_POINTER] * 4, c_int64, c_int, _POINTER]
        self._sinkhorn = functions.megacpt_cuda_sinkhorn
        self._sinkhorn.argtypes = [_POINTER, c_int, *[_POINTER] * 5, c_double, c_int, c_int64, c_int, _POINTER]
        functions.megacpt_cuda_workspace.restype = c_int64
        self._numbers = int(functions.megacpt_cuda_workspace())
        self._workspaces: dict[tuple[torch.device, int], Tensor] = {}
        self.most_experts = int(functions.megacpt_cuda_router_limit(0))
        self.most_chosen = int(functions.megacpt_cuda_router_limit(1))

    def fits(self, experts: int, top_k: int) -> bool:
        """Whether the kernel is compiled for rows of that size."""
        return experts <= self.most_experts and top_k <= self.most_chosen

    def route(self, logits: Tensor, bias: Tensor | None, mask: Tensor | None, scoring: Scoring) -> Routing:
        """See `router_reference.route`."""
        logits = logits.contiguous()
        tokens, width = logits.shape
        bias = None if bias is None else bias.float().contiguous()
        mask = None if mask is None else mask.contiguous()
        gates = logits.new_empty(tokens, scoring.top_k, dtype=torch.float32)
        experts = torch.empty_like(gates, dtype=torch.int32)
        lse = logits.new_empty(tokens, dtype=torch.float32)
        counts, prob_sum, z_sum = (logits.new_empty(size, dtype=torch.int64) for size in (width, width, 1))
        stream = self._stream(logits.device)
        with launched(logits.device) as check:
            check(
                self._route(
                    logits.data_ptr(), FORMATS[logits.dtype], address(bias), address(mask), gates.data_ptr(),
                    experts.data_ptr(), lse.data_ptr(), counts.data_ptr(), prob_sum.data_ptr(), z_sum.data_ptr(),
                    self._workspace(logits.device, stream).data_ptr(), tokens, width, scoring.top_k,
                    scoring.score == "sigmoid", scoring.renormalise, scoring.bias_on_logits, scoring.groups,
                    scoring.groups_kept, scoring.scale, stream,
                )
            )  # fmt: skip
        return Routing(gates, experts, lse, counts, prob_sum, z_sum)

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
        lse, experts, z = lse.contiguous(), experts.contiguous(), z.float().contiguous()
        tokens, width = logits.shape
        grad = torch.empty_like(logits)
        with launched(logits.device) as check:
            check(
                self._gradient(
                    logits.data_ptr(), grad.data_ptr(), FORMATS[logits.dtype], lse.data_ptr(), experts.data_ptr(),
                    grad_gates.data_ptr(), balance.data_ptr(), z.data_ptr(), tokens, width, scoring.top_k,
                    scoring.score == "sigmoid", scoring.renormalise, scoring.scale, self._stream(logits.device),
                )
            )  # fmt: skip
        return grad

    def softmax_sums(self, logits: Tensor, log_u: Tensor, mask: Tensor | None) -> Tensor:
        """See `router_reference.softmax_sums`."""
        logits, log_u = logits.contiguous(), log_u.float().contiguous()
        mask = None if mask is None else mask.contiguous()
        sums = logits.new_empty(logits.shape[1], dtype=torch.int64)
        stream = self._stream(logits.device)
        with launched(logits.device) as check:
            check(
                self._softmax_sums(
                    logits.data_ptr(), FORMATS[logits.dtype], log_u.data_ptr(), address(mask), sums.data_ptr(),
                    self._workspace(logits.device, stream).data_ptr(), *logits.shape, stream,
                )
            )  # fmt: skip
        return sums

    def sinkhorn(
        self, logits: Tensor, log_u: Tensor, mask: Tensor | None, tolerance: float, most_iterations: int
    ) -> tuple[Tensor, int, float]:
        """All iterations of `megacpt.ops.sinkhorn` over the tokens of one rank, in one launch.

        Its blocks wait for each other, and convergence is tested on the device; the host waits once, for the result.
        See `router_cpu.CompiledRouter.sinkhorn` for arguments and result.
        """
        logits, start = logits.contiguous(), log_u.double().contiguous()
        mask = None if mask is None else mask.contiguous()
        zeros = logits.new_zeros(1 + most_iterations * logits.shape[1], dtype=torch.int64)
        found, summary = torch.empty_like(start), start.new_empty(2)
        with launched(logits.device) as check:
            check(
                self._sinkhorn(
                    logits.data_ptr(), FORMATS[logits.dtype], start.data_ptr(), address(mask), zeros.data_ptr(),
                    found.data_ptr(), summary.data_ptr(), tolerance, most_iterations, *logits.shape,
                    self._stream(logits.device),
                )
            )  # fmt: skip
        made, error = summary.tolist()
        return found, int(made), error

    def _workspace(self, device: torch.device, stream: int) -> Tensor:
        if (device, stream) not in self._workspaces:
            self._workspaces[device, stream] = torch.zeros(self._numbers, dtype=torch.int64, device=device)
        return self._workspaces[device, stream]


@cache
def load() -> CudaRouter:
    """The kernels of this device.

    Raises:
        SetupError: the library can't be had; says why.
    """
    return CudaRouter(library())
