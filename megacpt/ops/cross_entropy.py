"""Vocabulary-parallel cross entropy in two passes over the logits: one forward, one backward.

The forward pass reads each shard of the logits once and keeps three numbers a token; the softmax is never stored. Two
all-reduces of the size of the tokens join the shards. The backward pass turns the logits into their own gradient.
All sums are float32, whatever the dtype of the logits.

Shapes: N tokens, V columns of this rank's shard of the vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacpt.ops import cross_entropy_cpu, cross_entropy_reference
from megacpt.ops.dispatch import FusedOp, Kernel

Partials = tuple[Tensor, Tensor, Tensor]


class Functions(Protocol):
    """What an implementation offers; see `cross_entropy_reference` for the meaning."""

    def partials(self, logits: Tensor, target: Tensor, vocab_start: int) -> Partials:
        """Row maximum, sum of exponentials, target's logit; [N] each."""
        ...

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
        """The gradient by the logits, into `out`, which may be `logits`."""
        ...


def _compiled() -> Functions:
    return cross_entropy_cpu.load()


CROSS_ENTROPY: FusedOp[Functions] = FusedOp(
    "cross_entropy",
    reference=cross_entropy_reference,
    fallback_cost="3 to 20 times slower than the compiled kernel on a CPU",
    kernels=(Kernel("cpu", cross_entropy_cpu.DTYPES, _compiled),),
)


def _functions(logits: Tensor) -> Functions:
    return CROSS_ENTROPY.choose(logits.device.type, logits.dtype).functions


@torch.library.custom_op(
    "megacpt::cross_entropy_partials",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, int vocab_start) -> (Tensor, Tensor, Tensor)",
)
def cross_entropy_partials(logits: Tensor, target: Tensor, vocab_start: int) -> Partials:
    """A shard's contribution to the loss of each token; see `cross_entropy_reference.partials`."""
    return _functions(logits).partials(logits, target, vocab_start)


@cross_entropy_partials.register_fake
def _(logits: Tensor, *_: Any) -> Partials:
    dtype = cross_entropy_reference.accumulation_dtype(logits.dtype)
    row_max, sum_exp, target_logit = (logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(3))
    return row_max, sum_exp, target_logit


_GRADIENT_ARGUMENTS = "Tensor target, Tensor row_max, Tensor sum_exp, Tensor grad_loss, int vocab_start"


@torch.library.custom_op(
    "megacpt::cross_entropy_gradient",
    mutates_args=(),
    schema=f"(Tensor logits, {_GRADIENT_ARGUMENTS}) -> Tensor",
)
def cross_entropy_gradient(
    logits: Tensor, target: Tensor, row_max: Tensor, sum_exp: Tensor, grad_loss: Tensor, vocab_start: int
) -> Tensor:
    """The gradient by the logits, in a tensor of its own; see `cross_entropy_reference.gradient`."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _functions(logits).gradient(logits, target, row_max, sum_exp, grad_loss, vocab_start, out)
    return out


@cross_entropy_gradient.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "megacpt::cross_entropy_gradient_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {_GRADIENT_ARGUMENTS}) -> ()",
)
def cross_entropy_gradient_(
    logits: Tensor, target: Tensor, row_max: Tensor, sum_exp: Tensor, grad_loss: Tensor, vocab_start: int
) -> None:
    """The gradient by the logits, written over them."""
    _functions(logits).gradient(logits, target, row_max, sum_exp, grad_loss, vocab_start, logits)


def rescaled(partials: Partials, top: Tensor) -> Tensor:
    """A shard's sum of exponentials relative to `top`, and its target logit; [2, N], to be summed over the shards.

    Args:
        partials: of the shard.
        top: [N], the largest logit over all shards.
    """
    row_max, sum_exp, target_logit = partials
    return torch.stack((sum_exp * (row_max - top).exp_(), target_logit))


def _join(partials: Partials, group: dist.ProcessGroup) -> Partials:
    """The partials of the whole vocabulary, on every rank."""
    top = partials[0].clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    sums = rescaled(partials, top)
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    return top, sums[0], sums[1]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, vocab_start: int, group: dist.ProcessGroup | None, keep: bool
    ) -> Tensor:
        partials: Partials = cross_entropy_partials(logits, target, vocab_start)
        if group is not None and group.size() > 1:
            partials = _join(partials, group)
        row_max, sum_exp, target_logit = partials
        ctx.save_for_backward(logits, target, row_max, sum_exp)
        ctx.vocab_start = vocab_start
        ctx.overwrite = not keep and logits.is_contiguous()
        return sum_exp.log() + (row_max - target_logit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, target, row_max, sum_exp = ctx.saved_tensors
        arguments = (target, row_max, sum_exp, grad_loss, ctx.vocab_start)
        if not ctx.overwrite or torch._C._autograd._get_current_graph_task_keep_graph():
            return cross_entropy_gradient(logits, *arguments), None, None, None, None
        grad = logits.detach()  # same storage and version counter: autograd refuses later uses of the old values
        cross_entropy_gradient_(grad, *arguments)
        return grad, None, None, None, None


def fused_cross_entropy(
    logits: Tensor,
    target: Tensor,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    *,
    keep_logits: bool = False,
) -> Tensor:
    """The cross entropy of each token, in nats, with the vocabulary sharded over the ranks of `group`.

    The backward pass overwrites `logits` with their gradient, which spares a tensor of their size. It writes a new
    tensor instead where that could be seen by accident: logits that are a leaf of the graph, that are not contiguous,
    or whose graph is retained. Autograd itself refuses to use overwritten logits; code that *reads* them after the
    backward pass must ask for `keep_logits`.

    Args:
        logits: [N, V], this rank's columns; float32, bfloat16, float16 or float64. The gradient has the same dtype.
        target: [N] int64, ids of the whole vocabulary.
        vocab_start: id of this rank's first column.
        group: the ranks that hold the other columns, equally many each; None if there are none.
        keep_logits: never overwrite the logits.

    Returns:
        [N] float32 (float64 for float64 logits); the same on every rank of the group.

    Raises:
        ValueError: shapes or dtypes are not as above.
        IndexError: a target is outside the vocabulary (on the CPU; elsewhere the check would stall the device).
    """
    if logits.dim() != 2 or target.shape != logits.shape[:1] or target.dtype is not torch.int64:
        raise ValueError(
            f"logits must be [N, V] and targets [N] int64, not {list(logits.shape)} and "
            f"{list(target.shape)} {target.dtype}"
        )
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, not {logits.dtype}")
    if target.device.type == "cpu" and target.numel():
        _check_targets(target, vocab_start, logits.shape[1], group)
    keep = keep_logits or logits.is_leaf
    loss: Tensor = _CrossEntropy.apply(logits, target, vocab_start, group, keep)
    return loss


def _check_targets(target: Tensor, vocab_start: int, width: int, group: dist.ProcessGroup | None) -> None:
    shards, rank = (1, 0) if group is None else (group.size(), group.rank())
    first = vocab_start - rank * width
    low, high = (int(bound) for bound in target.aminmax())
    if low < first or high >= first + shards * width:
        raise IndexError(
            f"targets from {low} to {high} are outside the vocabulary, {first} to {first + shards * width - 1}"
        )
