"""The mixture-of-experts router in two passes over the logits: one forward, one backward.

The forward pass scores, chooses the k best experts exactly, and sums up what balance losses need; nothing of size T x E
is written. The backward pass computes the scores again and joins the gradients of the gates, of the balance loss and of
the z-loss. `router_reference` says what each number means.

Between the two the caller may reduce the sums over ranks: `choose_experts` gives them, and `gated` takes the
coefficients that follow from them.

Shapes: T tokens, E experts, k experts a token.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megacpt.ops import router_cpu, router_cuda, router_reference
from megacpt.ops.dispatch import FusedOp, Kernel
from megacpt.ops.router_reference import Routing, Scoring
from megacpt.ops.tensors import FORMATS


class Functions(Protocol):
    """What an implementation offers; see `router_reference` for the meaning."""

    def route(self, logits: Tensor, bias: Tensor | None, mask: Tensor | None, scoring: Scoring) -> Routing:
        """Experts, gates and sums."""
        ...

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
        """The gradient by the logits."""
        ...

    def softmax_sums(self, logits: Tensor, log_u: Tensor, mask: Tensor | None) -> Tensor:
        """Column sums for Sinkhorn's algorithm."""
        ...


def _compiled() -> Functions:
    return router_cpu.load()


ROUTER: FusedOp[Functions] = FusedOp(
    "router",
    reference=router_reference,
    fallback_cost="several times slower than the compiled kernel on a CPU",
    kernels=(
        Kernel("cpu", frozenset(FORMATS), _compiled),
        Kernel("cuda", frozenset(FORMATS), router_cuda.load),
    ),
)


def _functions(logits: Tensor, top_k: int = 1) -> Functions:
    chosen = ROUTER.choose(logits.device.type, logits.dtype).functions
    compiled = router_cpu.CompiledRouter, router_cuda.CudaRouter
    if isinstance(chosen, compiled) and not chosen.fits(logits.shape[1], top_k):
        return ROUTER.reference
    return chosen


_SCORING = "int top_k, bool sigmoid, bool renormalise, float scale, bool bias_on_logits, int groups, int groups_kept"


def _scoring(
    top_k: int, sigmoid: bool, renormalise: bool, scale: float, bias_on_logits: bool, groups: int, groups_kept: int
) -> Scoring:
    return Scoring(top_k, "sigmoid" if sigmoid else "softmax", renormalise, scale, bias_on_logits, groups, groups_kept)


def _numbers(scoring: Scoring) -> tuple[int, bool, bool, float, bool, int, int]:
    """The scoring as the arguments of the ops, whose schemas know only numbers."""
    sigmoid = scoring.score == "sigmoid"
    limits = scoring.bias_on_logits, scoring.groups, scoring.groups_kept
    return scoring.top_k, sigmoid, scoring.renormalise, scoring.scale, *limits


@torch.library.custom_op(
    "megacpt::route",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor? bias, Tensor? mask, {_SCORING}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _route(logits: Tensor, bias: Tensor | None, mask: Tensor | None, *numbers: Any) -> tuple[Tensor, ...]:
    scoring = _scoring(*numbers)
    return tuple(_functions(logits, scoring.top_k).route(logits, bias, mask, scoring))


@_route.register_fake
def _(logits: Tensor, bias: Any, mask: Any, top_k: int, *_: Any) -> tuple[Tensor, ...]:  # noqa: ARG001
    tokens, width = logits.shape
    dtype = router_reference.accumulation_dtype(logits.dtype)
    gates, lse = logits.new_empty(tokens, top_k, dtype=dtype), logits.new_empty(tokens, dtype=dtype)
    experts = logits.new_empty(tokens, top_k, dtype=torch.int32)
    sums = [logits.new_empty(size, dtype=torch.int64) for size in (width, width, 1)]
    return gates, experts, lse, *sums


@torch.library.custom_op(
    "megacpt::route_gradient",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor lse, Tensor experts, Tensor grad_gates, Tensor balance, Tensor z, {_SCORING}) "
    "-> Tensor",
)
def _route_gradient(
    logits: Tensor, lse: Tensor, experts: Tensor, grad_gates: Tensor, balance: Tensor, z: Tensor, *numbers: Any
) -> Tensor:
    scoring = _scoring(*numbers)
    return _functions(logits, scoring.top_k).gradient(logits, lse, experts, grad_gates, balance, z, scoring)


@_route_gradient.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "megacpt::gated",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor gates, Tensor experts, Tensor lse, Tensor balance, Tensor z, {_SCORING}) -> Tensor",
)
def _gated(logits: Tensor, gates: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return gates.clone()


@_gated.register_fake
def _(logits: Tensor, gates: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return torch.empty_like(gates)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    logits, _, experts, lse, balance, z, *numbers = inputs
    ctx.save_for_backward(logits, lse, experts, balance, z)
    ctx.numbers = numbers


def _backward(ctx: Any, grad_gates: Tensor) -> tuple[Tensor | None, ...]:
    logits, lse, experts, balance, z = ctx.saved_tensors
    grad = _route_gradient(logits, lse, experts, grad_gates, balance, z, *ctx.numbers)
    return (grad, *[None] * 12)


_gated.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op(
    "megacpt::softmax_sums",
    mutates_args=(),
    schema="(Tensor logits, Tensor log_u, Tensor? mask) -> Tensor",
)
def softmax_sums(logits: Tensor, log_u: Tensor, mask: Tensor | None) -> Tensor:
    """Column sums for Sinkhorn's algorithm; see `router_reference.softmax_sums`."""
    return _functions(logits).softmax_sums(logits, log_u, mask)


@softmax_sums.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[1], dtype=torch.int64)


def choose_experts(logits: Tensor, scoring: Scoring, bias: Tensor | None = None, mask: Tensor | None = None) -> Routing:
    """Where each token goes; not differentiable (see `gated`).

    Args:
        logits: [T, E]; float32, bfloat16, float16 or float64.
        scoring: how logits become experts and gates.
        bias: [E], moves the choice and never the gates; None for none.
        mask: [T] bool, False for padding; None if there is none.

    Raises:
        ValueError: shapes, dtypes or the scoring do not fit.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be [T, E] and floating point, not {list(logits.shape)} {logits.dtype}")
    tokens, experts = logits.shape
    scoring.check(experts, bias is not None)
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"the bias must be [{experts}], not {list(bias.shape)}")
    if mask is not None and (mask.shape != (tokens,) or mask.dtype is not torch.bool):
        raise ValueError(f"the mask must be [{tokens}] bool, not {list(mask.shape)} {mask.dtype}")
    return Routing(*_route(logits.detach(), bias, mask, *_numbers(scoring)))


def gated(logits: Tensor, routing: Routing, balance: Tensor, z: Tensor, scoring: Scoring) -> Tensor:
    r"""The gates as a differentiable function of the logits, with the losses that balance experts.

    The backward pass adds the gradient of :math:`\sum_{t,e} c_e P_{te} + z \sum_t \mathrm{lse}_t^2` to that of the
    gates, as if these sums stood in the loss (which they do not: `balance` says what they are worth).

    Args:
        logits: [T, E], those of `routing`.
        routing: of `choose_experts`.
        balance: [E], the coefficients c of the routing probabilities; zeros for no balance loss.
        z: [1], the coefficient of the z-loss; zero for none.
        scoring: that of `routing`.

    Returns:
        [T, k].
    """
    gates: Tensor = _gated(logits, routing.gates, routing.experts, routing.lse, balance, z, *_numbers(scoring))
    return gates
