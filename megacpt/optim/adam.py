"""AdamW as Megatron Core expects it from its accelerators: the step is counted once a group, the kernel is fused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class FusedAdamW(torch.optim.AdamW):
    """Decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2) on PyTorch's fused CPU and CUDA kernel.

    torch's own AdamW keeps a step tensor for each parameter, on which Megatron's distributed optimizer trips
    (asserts before the first step; after a load all parameters share one tensor). Here the step is an integer of the
    group, as in Apex and Transformer Engine, and the moments exist from the start.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decay rate, multiplied by the learning rate.
        adam_w_mode: must be true; part of the signature that Megatron calls.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("FusedAdamW decouples the weight decay; adam_w_mode=False is another optimizer")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for group in self.param_groups:
            group["step"] = 0

    def create_state(self) -> None:
        """Create zero moments for every parameter that has none."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("FusedAdamW takes no closure")
        for group in self.param_groups:
            group["step"] += 1
            parameters = [p for p in group["params"] if p.grad is not None and p.numel()]
            if not parameters:
                continue
            count = torch.tensor(float(group["step"]), dtype=torch.float32, device=parameters[0].device)
            torch._fused_adamw_(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                [count] * len(parameters),
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=float(group["weight_decay"]),
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
