"""Tokens to their experts and back: sort by expert, copy each token to its rows, sum the rows of each token.

The sort is stable and the sums run over a token's slots in their order, without atomic additions: the same bits every
time. `expert_order_reference` says what each function means, and what `Order` tells a grouped product.

Shapes: T tokens, k experts a token, E experts, H hidden; Tk rows, whether or not slots are without an expert.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megacpt.ops import expert_order_cpu, expert_order_cuda, expert_order_reference
from megacpt.ops.dispatch import FusedOp, Kernel
from megacpt.ops.expert_order_reference import Order
from megacpt.ops.tensors import FORMATS


class Functions(Protocol):
    """What an implementation offers; see `expert_order_reference` for the meaning."""

    def sort(self, experts: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slots by expert."""
        ...

    def gather(self, tokens: Tensor, perm: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:
        """Tokens to rows."""
        ...

    def combine(self, rows: Tensor, inverse: Tensor, gates: Tensor | None) -> Tensor:
        """Rows to tokens."""
        ...

    def combine_gradient(
        self, grad: Tensor, rows: Tensor, perm: Tensor, inverse: Tensor, counts: Tensor, gates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients by rows and gates."""
        ...


def _compiled() -> Functions:
    return expert_order_cpu.load()


EXPERT_ORDER: FusedOp[Functions] = FusedOp(
    "expert order",
    reference=expert_order_reference,
    fallback_cost="several times slower than the compiled kernel on a CPU",
    kernels=(
        Kernel("cpu", frozenset((*FORMATS, torch.int32)), _compiled),
        Kernel("cuda", frozenset((*FORMATS, torch.int32)), expert_order_cuda.load),
    ),
)


def _functions(of: Tensor) -> Functions:
    return EXPERT_ORDER.choose(of.device.type, of.dtype).functions


@torch.library.custom_op(
    "megacpt::moe_sort", mutates_args=(), schema="(Tensor experts, int width) -> (Tensor, Tensor, Tensor)"
)
def _sort(experts: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return _functions(experts).sort(experts, width)


@_sort.register_fake
def _(experts: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    perm, counts = experts.new_empty(experts.numel()), experts.new_empty(width, dtype=torch.int64)
    return perm, torch.empty_like(experts, memory_format=torch.contiguous_format), counts


@torch.library.custom_op(
    "megacpt::gather_tokens",
    mutates_args=(),
    schema="(Tensor tokens, Tensor perm, Tensor inverse, Tensor counts) -> Tensor",
)
def _gather(tokens: Tensor, perm: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:
    return _functions(tokens).gather(tokens, perm, inverse, counts)


@_gather.register_fake
def _(tokens: Tensor, perm: Tensor, *_: Any) -> Tensor:
    return tokens.new_empty(perm.shape[0], tokens.shape[1])


@torch.library.custom_op(
    "megacpt::combine_tokens",
    mutates_args=(),
    schema="(Tensor rows, Tensor perm, Tensor inverse, Tensor counts, Tensor? gates) -> Tensor",
)
def _combine(rows: Tensor, perm: Tensor, inverse: Tensor, counts: Tensor, gates: Tensor | None) -> Tensor:
    del perm, counts  # for the backward pass
    return _functions(rows).combine(rows, inverse, gates)


@_combine.register_fake
def _(rows: Tensor, perm: Tensor, inverse: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return rows.new_empty(inverse.shape[0], rows.shape[1])


@torch.library.custom_op(
    "megacpt::combine_tokens_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor rows, Tensor perm, Tensor inverse, Tensor counts, Tensor gates) -> (Tensor, Tensor)",
)
def _combine_gradient(
    grad: Tensor, rows: Tensor, perm: Tensor, inverse: Tensor, counts: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor]:
    return _functions(rows).combine_gradient(grad, rows, perm, inverse, counts, gates)


@_combine_gradient.register_fake
def _(grad: Tensor, rows: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(like, memory_format=contiguous) for like in (rows, others[-1]))  # type: ignore[return-value]


def _keep_order(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1:4])


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _combine(grad, *ctx.saved_tensors, None), None, None, None


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, perm, inverse, counts, gates = ctx.saved_tensors
    if gates is None:
        return _gather(grad, perm, inverse, counts), None, None, None, None
    by_rows, by_gates = _combine_gradient(grad, rows, perm, inverse, counts, gates)
    return by_rows, None, None, None, by_gates


_gather.register_autograd(_gather_backward, setup_context=_keep_order)
_combine.register_autograd(_combine_backward, setup_context=_keep_all)


def moe_sort(experts: Tensor, width: int) -> Order:
    """Sort the slots of tokens by expert.

    Args:
        experts: [T, k] int32; -1 for none, which drops the slot.
        width: E, the number of experts.

    Raises:
        ValueError: the experts are not as above.
    """
    if experts.dim() != 2 or experts.dtype is not torch.int32:
        raise ValueError(f"experts must be [T, k] int32, not {list(experts.shape)} {experts.dtype}")
    perm, inverse, counts = _sort(experts, width)
    return Order(perm, inverse, counts, counts.cumsum(0).int())


def gather_tokens(tokens: Tensor, order: Order) -> Tensor:
    """Copy each token to the rows of its slots; differentiable by the tokens.

    Args:
        tokens: [T, H]; float32, bfloat16, float16 or float64.
        order: of `moe_sort`.

    Returns:
        [T k, H], sorted by expert; 0 behind the last one's rows.

    Raises:
        ValueError: the tokens are not those of the order.
    """
    if tokens.dim() != 2 or tokens.shape[0] != order.inverse.shape[0]:
        raise ValueError(f"tokens must be [{order.inverse.shape[0]}, H] for this order, not {list(tokens.shape)}")
    rows: Tensor = _gather(tokens, *order[:3])
    return rows


def combine_tokens(rows: Tensor, order: Order, gates: Tensor) -> Tensor:
    """Sum the rows of each token, weighted by its gates and accumulated in float32; differentiable by both.

    Args:
        rows: [T k, H], what the experts made of their rows; float32, bfloat16, float16 or float64.
        order: of `moe_sort`.
        gates: [T, k].

    Returns:
        [T, H], of the dtype of `rows`; 0 for tokens without an expert.

    Raises:
        ValueError: rows or gates are not those of the order.
    """
    if rows.dim() != 2 or rows.shape[0] != order.perm.shape[0] or gates.shape != order.inverse.shape:
        raise ValueError(
            f"rows must be [{order.perm.shape[0]}, H] and gates {list(order.inverse.shape)} for this order, not "
            f"{list(rows.shape)} and {list(gates.shape)}"
        )
    out: Tensor = _combine(rows, *order[:3], gates)
    return out
