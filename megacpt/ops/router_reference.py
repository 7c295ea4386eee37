r"""The definition of the mixture-of-experts router, in torch: any device, float64 included.

Shapes: T tokens, E experts, k experts a token. Arithmetic is float32, or float64 for float64 logits.

A token's logits :math:`l_e` become scores :math:`s_e`: their softmax, or the sigmoid of each. The k experts of the
highest *key* are chosen; among equal keys the lower index comes first. The key is the logit, or, where there is a bias
or groups, score plus bias (``bias_on_logits``: logit plus bias). The bias moves the choice alone. The gates are the
scores of the chosen, divided by their sum if they are renormalised (for softmax that is the softmax over the chosen
logits), times a factor.

The routing probabilities that balance losses are made of are :math:`P_e = s_e / \sum_j s_j`, of all experts and
without bias. Their sums over tokens, and that of the squared log-sum-exp of the logits, are integers in fixed point:
no order of addition, no number of threads or ranks changes a bit of them.

A token that is masked has experts -1 and gates 0, and counts nowhere. A token whose logits hold NaN or +inf, or are
all -inf, is *broken*: it is sent to the first k experts, its gates are NaN, so that the loss shows it, and its
probabilities are left out of the sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

PROBABILITY_ONE = 1 << 30
"""What a probability of 1 is in the fixed-point sums; they hold 2**33 tokens."""
Z_ONE = 1 << 20
"""What a squared log-sum-exp of 1 is in its fixed-point sum; it holds 2**19 tokens of the largest, 4096 squared."""
Z_LARGEST = 4096.0
_SMALL = 1e-20  # added to the sum of sigmoid gates, as the models that use them were trained


@dataclass(frozen=True)
class Scoring:
    """How logits become experts and gates.

    Attributes:
        top_k: experts a token.
        score: ``softmax`` over all experts, or the ``sigmoid`` of each logit.
        renormalise: divide the gates by their sum (nothing to do for one expert a token with sigmoid scores).
        scale: factor on the gates.
        bias_on_logits: the bias is added to the logit (as Sinkhorn's log u) and not to the score.
        groups: equal groups of experts; only `groups_kept` of them, those with the largest sum of their best
            ``top_k / groups_kept`` keys, may be chosen from (DeepSeek-V2 and V3).
        groups_kept: groups that a token may use.
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    bias_on_logits: bool = False
    groups: int = 1
    groups_kept: int = 1

    def check(self, experts: int, biased: bool) -> None:
        """Raise ValueError if this cannot be done with `experts` experts."""
        if not 1 <= self.top_k <= experts:
            raise ValueError(f"top_k is {self.top_k}: it must be from 1 to the number of experts, {experts}")
        if self.groups < 1 or experts % self.groups or not 1 <= self.groups_kept <= self.groups:
            raise ValueError(f"{self.groups} groups of which {self.groups_kept} are kept do not fit {experts} experts")
        if self.groups > 1 and self.bias_on_logits and biased:
            raise ValueError("groups are ranked by scores: a bias on the logits does not go with them")
        if self.top_k % self.groups_kept or self.top_k // self.groups_kept > experts // self.groups:
            raise ValueError(
                f"top_k {self.top_k} must be {self.groups_kept} times a number of experts that a group has "
                f"({experts // self.groups})"
            )


class Routing(NamedTuple):
    """Where tokens go, and the sums that balance losses are made of.

    Attributes:
        gates: [T, k], weights of the experts' outputs.
        experts: [T, k] int32, best key first.
        lse: [T], log-sum-exp of the logits; 0 for masked tokens, NaN for broken ones.
        counts: [E] int64, how often each expert was chosen.
        prob_sum: [E] int64, the sum of the routing probabilities, in fixed point (`PROBABILITY_ONE`).
        z_sum: [1] int64, the sum of the squared log-sum-exp, in fixed point (`Z_ONE`).
    """

    gates: Tensor
    experts: Tensor
    lse: Tensor
    counts: Tensor
    prob_sum: Tensor
    z_sum: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gates and sums for logits of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def route(logits: Tensor, bias: Tensor | None, mask: Tensor | None, scoring: Scoring) -> Routing:
    """Choose the experts of each token.

    Args:
        logits: [T, E].
        bias: [E], moves the choice; None for none.
        mask: [T] bool, False for tokens that are padding; None if there are none.
        scoring: how.
    """
    x = logits.to(accumulation_dtype(logits.dtype))
    broken = _broken(x)
    first = torch.arange(scoring.top_k, device=x.device)
    experts = torch.where(broken[:, None], first, _choose(x, bias, scoring))
    score = _scores(x, scoring)
    gates = _gates(x.gather(1, experts), score.gather(1, experts), scoring)
    gates = gates.masked_fill(broken[:, None], torch.nan)
    lse = x.logsumexp(1).masked_fill(broken, torch.nan)
    taken = torch.ones_like(broken) if mask is None else mask
    gates = gates.masked_fill(~taken[:, None], 0.0)
    counts = torch.bincount(experts[taken].flatten(), minlength=logits.shape[1])
    summed = taken & ~broken
    probabilities = _probabilities(score[summed]).double()
    prob_sum = (probabilities * PROBABILITY_ONE).round().long().sum(0)
    z = lse[summed].double().abs().clamp(max=Z_LARGEST).square()
    z_sum = (z * Z_ONE).round().long().sum().view(1)
    experts = experts.masked_fill(~taken[:, None], -1).int()
    return Routing(gates, experts, lse.masked_fill(~taken, 0.0), counts, prob_sum, z_sum)


def gradient(
    logits: Tensor,
    lse: Tensor,
    experts: Tensor,
    grad_gates: Tensor,
    balance: Tensor,
    z: Tensor,
    scoring: Scoring,
) -> Tensor:
    r"""The gradient of gates and balance losses by the logits.

    That is of :math:`\sum_{t,k} d_{tk} g_{tk} + \sum_{t,e} c_e P_{te} + z \sum_t \mathrm{lse}_t^2`.
    Written by hand rather than by autograd, as the kernels compute it.

    Args:
        logits: [T, E].
        lse: [T], of `route`.
        experts: [T, k], of `route`; -1 where the token is masked.
        grad_gates: [T, k], the gradient d of the gates.
        balance: [E], the coefficients c of the routing probabilities.
        z: [1], the coefficient of the squared log-sum-exp.
        scoring: how they were chosen.

    Returns:
        [T, E], of the dtype of `logits`; 0 for masked tokens, NaN for broken ones.
    """
    dtype = accumulation_dtype(logits.dtype)
    x = logits.to(dtype)
    masked = experts[:, 0] < 0
    chosen = experts.clamp(min=0).long()
    grad_gates = grad_gates.to(dtype) * scoring.scale
    softmax = (x - lse[:, None]).exp()
    score = softmax if scoring.score == "softmax" else x.sigmoid()
    total = score.sum(1, keepdim=True)
    probability = score / total
    by_score = (balance.to(dtype) - (balance.to(dtype) * probability).sum(1, keepdim=True)) / total
    at_chosen = _gates_gradient(x.gather(1, chosen), score.gather(1, chosen), grad_gates, scoring)
    if scoring.score == "softmax":
        result = by_score * total * score
        if not scoring.renormalise:
            result = result - score * (grad_gates * score.gather(1, chosen)).sum(1, keepdim=True)
    else:
        result = by_score * score * (1 - score)
    result = result.scatter_add(1, chosen, at_chosen) + 2 * z.to(dtype) * lse[:, None] * softmax
    return result.masked_fill(lse.isnan()[:, None], torch.nan).masked_fill(masked[:, None], 0.0).to(logits.dtype)


def softmax_sums(logits: Tensor, log_u: Tensor, mask: Tensor | None) -> Tensor:
    """The sums over tokens of softmax(logits + log_u), [E] int64 in fixed point (`PROBABILITY_ONE`).

    Masked and broken tokens are left out. This is a column sum of the matrix that Sinkhorn's algorithm balances, its
    rows normalised.

    Args:
        logits: [T, E].
        log_u: [E].
        mask: [T] bool, False for padding; None if there is none.
    """
    x = logits.to(accumulation_dtype(logits.dtype))
    summed = ~_broken(x) if mask is None else mask & ~_broken(x)
    probabilities = (x[summed] + log_u.to(x.dtype)).softmax(1).double()
    return (probabilities * PROBABILITY_ONE).round().long().sum(0)


def _broken(x: Tensor) -> Tensor:
    return x.isnan().any(1) | (x == torch.inf).any(1) | (x == -torch.inf).all(1)


def _scores(x: Tensor, scoring: Scoring) -> Tensor:
    return x.softmax(1) if scoring.score == "softmax" else x.sigmoid()


def _probabilities(score: Tensor) -> Tensor:
    return score / score.sum(1, keepdim=True)


def _choose(x: Tensor, bias: Tensor | None, scoring: Scoring) -> Tensor:
    """The indices of the k largest keys, [T, k]; the lower index first among equal ones."""
    key = x if scoring.groups == 1 and (bias is None or scoring.bias_on_logits) else _scores(x, scoring)
    key = key if bias is None else key + bias.to(x.dtype)
    dropped = torch.zeros_like(key, dtype=torch.bool)
    if scoring.groups > 1:
        tokens, experts = key.shape
        size = experts // scoring.groups
        best = key.view(tokens, scoring.groups, size).sort(dim=2, descending=True, stable=True).values
        strength = best[:, :, : scoring.top_k // scoring.groups_kept].sum(2)
        kept = strength.sort(dim=1, descending=True, stable=True).indices[:, : scoring.groups_kept]
        dropped = torch.ones_like(strength, dtype=torch.bool).scatter(1, kept, False).repeat_interleave(size, 1)
    order = key.sort(dim=1, descending=True, stable=True).indices
    # Experts of dropped groups come behind all others, -inf keys of kept groups included.
    behind = dropped.gather(1, order).to(torch.int8)
    return order.gather(1, behind.sort(dim=1, stable=True).indices)[:, : scoring.top_k]


def _gates(logit: Tensor, score: Tensor, scoring: Scoring) -> Tensor:
    """The gates from logits and scores of the chosen experts, [T, k] each."""
    gates = score
    if scoring.renormalise and scoring.score == "softmax":
        gates = logit.softmax(1)
    elif scoring.renormalise and scoring.top_k > 1:
        gates = score / (score.sum(1, keepdim=True) + _SMALL)
    return gates * scoring.scale


def _gates_gradient(logit: Tensor, score: Tensor, grad: Tensor, scoring: Scoring) -> Tensor:
    """What the gates add to the gradient by the chosen logits, [T, k]; without softmax's pull on all others."""
    if scoring.score == "softmax":
        if not scoring.renormalise:
            return grad * score
        gate = logit.softmax(1)
        return gate * (grad - (grad * gate).sum(1, keepdim=True))
    if scoring.renormalise and scoring.top_k > 1:
        total = score.sum(1, keepdim=True) + _SMALL
        grad = (grad - (grad * score).sum(1, keepdim=True) / total) / total
    return grad * score * (1 - score)
