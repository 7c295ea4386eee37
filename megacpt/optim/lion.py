"""Lion: steps of one size, in the direction that a running mean of the gradient points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megacpt.optim.moments import MomentOptimizer


class Lion(MomentOptimizer):
    """Sign momentum with decoupled weight decay (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

    With the gradient g and the mean m, a weight moves by the rate times the sign of ``beta1 m + (1 - beta1) g``; then
    ``m = beta2 m + (1 - beta2) g``. `eps` is not used. One moment instead of Adam's two, and no correction for its age.
    """

    MOMENTS = ("exp_avg",)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Lion takes no closure")
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            rate, decay = float(group["lr"]), float(group["weight_decay"])
            for _, parameters, gradients in self._due(group):
                means = self._states(parameters, "exp_avg")
                updates = torch._foreach_lerp(gradients, means, beta1)
                torch._foreach_sign_(updates)
                torch._foreach_mul_(parameters, 1 - rate * decay)
                torch._foreach_add_(parameters, updates, alpha=-rate)
                torch._foreach_lerp_(means, gradients, 1 - beta2)
