"""AdamW as Megatron Core expects it from its accelerators, on PyTorch's fused kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megacpt.optim.moments import Carry, MomentOptimizer


class FusedAdamW(MomentOptimizer):
    """Decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2) on PyTorch's fused CPU and CUDA kernel.

    torch's own AdamW keeps a step tensor for each parameter, on which Megatron's distributed optimizer trips
    (asserts before the first step; after a load all parameters share one tensor). Here ages are numbers beside the
    state, and the moments exist from the start.
    """

    MOMENTS = ("exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def carry(self, carries: dict[str, Carry]) -> None:
        """See `MomentOptimizer.carry`.

        A second moment that begins anew beside a first one that goes on takes the square of that one for its first
        observation: all that is known of the gradient's size. Begun from nothing, it would divide what was gathered of
        the gradient by nothing wherever the next gradient is 0, as for the tokens that the next batch lacks.
        """
        super().carry(carries)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                counts, state = self.counts[parameter], self.state[parameter]
                if counts["exp_avg"] and not counts["exp_avg_sq"]:
                    mean = state["exp_avg"] / (1 - beta1 ** counts["exp_avg"])
                    state["exp_avg_sq"].copy_(mean.square_().mul_(1 - beta2))
                    counts["exp_avg_sq"] = 1.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("FusedAdamW takes no closure")
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for counts, parameters, gradients in self._due(group):
                first, second = counts["exp_avg"], counts["exp_avg_sq"]
                # The kernel corrects both moments for one age. Where the first has another, the rate makes up for it,
                # and the decay for the rate.
                ratio = 1.0 if first == second else (1 - beta1**second) / (1 - beta1**first)
                count = torch.tensor(second, dtype=torch.float32, device=parameters[0].device)
                torch._fused_adamw_(
                    parameters,
                    gradients,
                    self._states(parameters, "exp_avg"),
                    self._states(parameters, "exp_avg_sq"),
                    [],
                    [count] * len(parameters),
                    lr=float(group["lr"]) * ratio,
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=float(group["weight_decay"]) / ratio,
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                )
