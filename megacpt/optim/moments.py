"""What optimizers with running means share: their state, how old each mean is, and what a boundary does to it.

A running mean m of decay b that began at 0 has, after t updates, the mass 1 - b^t: the weights of all that it has seen
sum to that, and m / (1 - b^t) is the mean itself (Kingma and Ba 2015, section 3). A boundary may let the past count
less: with the factor d both m and its mass are multiplied by d, and t becomes the number of updates that gives this
mass. The mean stays what it was; what comes next weighs more in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

# Beyond this many halvings of what is missing, a mass is 1 in float64.
_FULL = -64 * math.log(2)


@dataclass(frozen=True)
class Carry:
    """What a boundary does to a running mean.

    Attributes:
        factor: 1 keeps it, 0 resets it, between the past counts that much less.
        before: decay of the mean in the optimizer that gathered it.
        after: decay in the one that goes on with it.
    """

    factor: float = 1.0
    before: float = 0.0
    after: float = 0.0

    def count(self, count: float) -> float:
        """Return how many updates of the new decay make the mass that the mean of `count` updates has after it.

        Under the same decay and with a factor of 1 the count is returned as it is.
        """
        if self.factor == 0 or count == 0:
            return 0.0
        if self.factor == 1 and self.before == self.after:
            return count
        if self.after == 0:  # a mean without memory: it is what comes next, whatever it was
            return 0.0
        missing = count * math.log(self.before) if self.before > 0 else _FULL  # log(1 - mass)
        if self.factor < 1:
            missing = math.log1p(self.factor * math.expm1(missing))
        return max(missing, _FULL) / math.log(self.after)


class MomentOptimizer(torch.optim.Optimizer):
    """An optimizer whose state are running means, as Megatron Core expects one from its accelerators.

    The state exists from the start (`create_state`). How many updates are in a mean is counted for each parameter, so
    that parts of the model may be trained for different lengths of time, and for each mean, as a number that need not
    be whole, so that a boundary may keep one and reset another.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: two decay rates; what each is for is up to the optimizer.
        eps: a small number against division by zero.
        weight_decay: decay rate, multiplied by the learning rate.
        adam_w_mode: must be true; part of the signature that Megatron calls.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ()

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
            raise ValueError("the weight decay is decoupled; adam_w_mode=False is another optimizer")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.counts: dict[Tensor, dict[str, float]] = {}

    def create_state(self) -> None:
        """Create means of no updates for every parameter that has none."""
        for parameter in self.parameters():
            if not self.state[parameter]:
                for moment in self.MOMENTS:
                    self.state[parameter][moment] = torch.zeros_like(parameter, dtype=torch.float32)
                self.counts[parameter] = dict.fromkeys(self.MOMENTS, 0.0)

    def parameters(self) -> Iterator[Tensor]:
        """Every parameter of every group."""
        for group in self.param_groups:
            yield from group["params"]

    def carry(self, carries: dict[str, Carry]) -> None:
        """Do to the means what a boundary asks for; those that are not named stay as they are."""
        for parameter in self.parameters():
            for moment, carry in carries.items():
                if carry.factor == 0:
                    self.state[parameter][moment].zero_()
                elif carry.factor != 1:
                    self.state[parameter][moment].mul_(carry.factor)
                self.counts[parameter][moment] = carry.count(self.counts[parameter][moment])

    def _due(self, group: dict[str, Any]) -> Iterator[tuple[dict[str, float], list[Tensor], list[Tensor]]]:
        """Count an update of every parameter with a gradient; yield those of the same age, with their gradients."""
        ages: dict[tuple[float, ...], list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.numel():
                counts = {moment: count + 1 for moment, count in self.counts[parameter].items()}
                self.counts[parameter] = counts
                ages.setdefault(tuple(counts.values()), []).append(parameter)
        for age, parameters in ages.items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            yield dict(zip(self.MOMENTS, age, strict=True)), parameters, gradients

    def _states(self, parameters: list[Tensor], moment: str) -> list[Tensor]:
        return [self.state[parameter][moment] for parameter in parameters]
