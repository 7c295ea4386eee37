"""What routers learn of their load during an optimizer step, and what they make of it at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megacpt.config.moe import BiasBalance, SinkhornBalance
from megacpt.ops.balance import assignments, z_loss
from megacpt.ops.router_reference import PROBABILITY_ONE, Routing
from megacpt.ops.sinkhorn import improved

if TYPE_CHECKING:
    from megacpt.model.router import Router


class Load:
    """Sums over the microbatches of a step, on this rank.

    What is learned from is whole numbers, so that no layout and no order of microbatches changes a bit of it.

    Args:
        experts: E.

    Attributes:
        counts: [E] int64, how often each expert was chosen.
        dropped: [1] int64, choices that found no room.
        z_sum: [1] int64, in fixed point: the squared log-sum-exp of the logits.
        sinkhorn_sums: [E] int64, in fixed point: column sums of the balanced probabilities.
        penalty: [1] float64, the balance loss summed over tokens.
        log_u: [E] float64, the sum of Sinkhorn's biases of the microbatches.
        passes: how many microbatches.
    """

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.reset(torch.device("cpu"))

    def reset(self, device: torch.device) -> None:
        """Begin a step."""
        self.counts, self.sinkhorn_sums = (
            torch.zeros(self.experts, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.dropped, self.z_sum = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self.penalty = torch.zeros(1, dtype=torch.float64, device=device)
        self.log_u = torch.zeros(self.experts, dtype=torch.float64, device=device)
        self.passes = 0

    def add(self, routing: Routing, experts: Tensor) -> None:
        """Count a microbatch.

        Args:
            routing: where its tokens wanted to go.
            experts: [T, k], where they went; -1 for what was dropped.
        """
        self.counts += routing.counts
        self.z_sum += routing.z_sum
        self.dropped += ((experts < 0) & (routing.experts >= 0)).sum()
        self.passes += 1

    def add_penalty(self, coefficients: Tensor, prob_sum: Tensor) -> None:
        """Add what the balance loss was of tokens under the same coefficients [E]; `prob_sum` [E] in fixed point."""
        self.penalty += torch.dot(coefficients.double(), prob_sum.double()) / PROBABILITY_ONE

    def add_log_u(self, log_u: Tensor) -> None:
        """Add the bias [E] that balanced a microbatch."""
        self.log_u += log_u

    def whole(self) -> Tensor:
        """All whole numbers, [2 E + 2]."""
        return torch.cat((self.counts, self.sinkhorn_sums, self.dropped, self.z_sum))


class LayerLoad(NamedTuple):
    """How one layer's experts were used in a step.

    Attributes:
        max_load: the largest share of tokens that one expert had (maximum routing imbalance).
        entropy: of the shares of the experts, 1 where they are even and 0 where one has all.
        dropped: the share of choices that found no room.
        penalty: the balance loss, a mean over tokens.
        z: the z-loss, a mean over tokens.
    """

    max_load: float
    entropy: float
    dropped: float
    penalty: float
    z: float


@torch.no_grad()
def end_step(routers: Sequence[Router], learn: bool) -> dict[int, LayerLoad]:
    """Let routers learn from the load of the step, and begin the next; all ranks of a pipeline stage call this.

    Args:
        routers: those of this rank.
        learn: with False (a step that was skipped) nothing is learned.

    Returns:
        The load of each layer, by its number in the model.
    """
    if not routers:
        return {}
    group = routers[0].data_group
    whole = torch.stack([router.load.whole() for router in routers])
    floating = torch.stack([torch.cat((router.load.penalty, router.load.log_u)) for router in routers])
    if group.size() > 1:
        dist.all_reduce(whole, group=group)
        dist.all_reduce(floating, group=group)
    found = {}
    for router, sums, others in zip(routers, whole, floating, strict=True):
        width = router.moe.experts
        counts, sinkhorn_sums, rest = sums[:width], sums[width : 2 * width], sums[2 * width :]
        if learn:
            _learn(router, counts, sinkhorn_sums, others[1:] / (max(router.load.passes, 1) * group.size()))
        found[router.layer_number] = _layer_load(router, counts, rest, float(others[0]))
        router.load.reset(router.weight.device)
    return found


def _learn(router: Router, counts: Tensor, sinkhorn_sums: Tensor, log_u: Tensor) -> None:
    """Take the sums of a step over all ranks into the state of a router; `log_u` is a mean."""
    if not router.weight.requires_grad:
        return  # a part that the stage leaves as it is
    balance = router.moe.balance
    router.shares.copy_(assignments(counts))
    if isinstance(balance, BiasBalance):
        # Wang et al. 2024, algorithm 1: by the sign of what is missing to the mean load.
        missing = counts.sum() - counts * counts.numel()
        router.choice_bias += balance.rate * missing.sign()
    elif isinstance(balance, SinkhornBalance) and balance.scope == "step":
        router.log_u.copy_(improved(router.log_u, sinkhorn_sums)[0])
    elif isinstance(balance, SinkhornBalance):
        router.log_u.copy_(log_u)


def _layer_load(router: Router, counts: Tensor, rest: Tensor, penalty: float) -> LayerLoad:
    shares = assignments(counts)
    tokens = max(int(counts.sum()) / router.moe.top_k, 1.0)
    entropy = -float(torch.special.xlogy(shares, shares).sum())
    return LayerLoad(
        max_load=float(counts.max()) / tokens,
        entropy=entropy / math.log(counts.numel()) if counts.numel() > 1 else 1.0,
        dropped=float(rest[0]) / (tokens * router.moe.top_k),
        penalty=penalty / tokens,
        z=float(z_loss(rest[1:], round(tokens), router.moe.z_loss)),
    )
