r"""Sinkhorn's algorithm for balanced routing, as a bias on the logits.

The balanced matrix is :math:`v_t \, e^{l_{te}} u_e`, with u and v such that each row sums to one and each column to
:math:`T / E`. A row's factor does not change its order, so the experts of a token are simply the largest of
:math:`l_{te} + \log u_e`: all that routing needs is a vector of E numbers. Rows that sum to one are a softmax, so an
iteration is

.. math:: n_e = \sum_t \operatorname{softmax}(l_t + \log u)_e, \qquad
          c_e = \frac{E \, n_e}{\sum_j n_j}, \qquad \log u_e \leftarrow \log u_e - \log c_e

until the mean of :math:`|c_e - 1|` is below the tolerance: no scale can drift and nothing overflows. The sums are
integers in fixed point; with a process group they are summed over its ranks, so that every number of ranks, threads
and every order of tokens gives the same bits. Without one, the compiled kernel makes all iterations in one call.

Two further rules are for comparison with other frameworks. ``megatron`` iterates from ones until the mean change of u
is below 1e-4, in whatever scale u has: on skewed logits that takes thousands of iterations. ``neox3`` starts from
:math:`1 / (E \sum_t e^{l_{te}})` and makes three. Both are bounded here, and balance the tokens of one rank.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megacpt.ops.router import ROUTER, softmax_sums
from megacpt.ops.router_cpu import CompiledRouter
from megacpt.ops.router_cuda import CudaRouter

Rule = Literal["scale_free", "megatron", "neox3"]
_EPSILON = 1e-8  # of the two other rules
_FARTHEST = 200.0  # an expert whose logits are all -inf would be pushed for ever


class Balanced(NamedTuple):
    """The bias that balances.

    Attributes:
        log_u: [E] float32, to be added to the logits.
        iterations: how many were made.
        error: the mean of :math:`|c_e - 1|` (scale_free), or the mean change of u (the others), in the last one.
    """

    log_u: Tensor
    iterations: int
    error: float


def sinkhorn(
    logits: Tensor,
    *,
    log_u: Tensor | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    tolerance: float = 1e-2,
    most_iterations: int = 8,
    rule: Rule = "scale_free",
) -> Balanced:
    """Find the bias under which the softmax of the logits gives every expert the same load.

    Args:
        logits: [T, E]; tokens that hold NaN or +inf, or nothing but -inf, count nowhere.
        log_u: [E], where to start (of the last batch, say); None for zeros. Not for the other rules.
        mask: [T] bool, False for padding; None if there is none.
        group: ranks whose tokens are balanced together; None for these alone.
        tolerance: stop when the mean relative imbalance is below this.
        most_iterations: stop then in any case.
        rule: how.

    Raises:
        ValueError: the rule does not know a group, a mask or a start.
    """
    if rule != "scale_free":
        if group is not None or log_u is not None or mask is not None:
            raise ValueError(f"the rule {rule} balances the tokens of one rank, all of them and from scratch")
        return _in_scale(logits, rule, tolerance, most_iterations)
    logits = logits.detach()
    start = logits.new_zeros(logits.shape[1]) if log_u is None else log_u
    current, error, made = start.double(), 0.0, 0
    alone, kernel = group is None or group.size() == 1, _compiled(logits)
    if alone and kernel is not None:
        current, made, error = kernel.sinkhorn(logits, current, mask, tolerance, most_iterations)
        return Balanced(current.float(), made, error)
    while made < most_iterations:
        load = softmax_sums(logits, current.float(), mask)
        if not alone:
            dist.all_reduce(load, group=group)
        made += 1
        current, error = improved(current, load)
        if error <= tolerance:
            break
    return Balanced(current.float(), made, error)


def improved(log_u: Tensor, load: Tensor) -> tuple[Tensor, float]:
    """Make one iteration: move the bias against the load that it leads to.

    Args:
        log_u: [E].
        load: [E] int64, what `softmax_sums` gives for it, over all tokens that are balanced together.

    Returns:
        The new bias, [E] float64, and the mean of :math:`|c_e - 1|` before the move.
    """
    kernel = _compiled(log_u.float())
    if isinstance(kernel, CompiledRouter):
        return kernel.improve(log_u, load)
    experts, total = load.numel(), load.sum().double().clamp(min=1)
    share = experts * load.double() / total
    # An expert that nothing is left for gets the smallest load there is, and comes back.
    moved = log_u.double() - torch.maximum(share, experts / (total + 1)).log()
    return (moved - moved.mean()).clamp(-_FARTHEST, _FARTHEST), float((share - 1).abs().mean())


def _compiled(values: Tensor) -> CompiledRouter | CudaRouter | None:
    """The compiled kernel, if it is what runs on vectors [..., E] such as these."""
    chosen = ROUTER.choose(values.device.type, values.dtype).functions
    return chosen if isinstance(chosen, CompiledRouter | CudaRouter) and chosen.fits(values.shape[-1], 1) else None


def _in_scale(logits: Tensor, rule: Rule, tolerance: float, most_iterations: int) -> Balanced:
    """The iterations of Megatron Core and of GPT-NeoX, in float64, where exp does not overflow below 700."""
    cost = logits.double().exp()
    tokens, experts = cost.shape
    column = cost.new_ones(experts) if rule == "megatron" else 1 / (experts * cost.sum(0))
    limit = most_iterations if rule == "megatron" else min(3, most_iterations)
    error, made = float("inf"), 0
    while error > tolerance and made < limit:
        row = 1 / tokens / (cost @ column + _EPSILON)
        before, column = column, 1 / experts / (row @ cost + _EPSILON)
        error, made = float((before - column).abs().mean()), made + 1
    return Balanced(column.log().float(), made, error)
