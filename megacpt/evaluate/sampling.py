"""The next token from a model's logits: greedy, or drawn at a temperature from the likeliest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacpt.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: the logits are divided by it; 0 takes the likeliest token, always the same.
        top_k: draw only from this many of the likeliest tokens; None for all.
        top_p: draw only from the likeliest tokens that together reach this probability, at least one (nucleus
            sampling, Holtzman et al. 2020, section 3.1); None for all. Counted among the `top_k` at `temperature`.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature {self.temperature:g}: must be 0 (take the likeliest token) or above")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top-k {self.top_k}: must be 1 or more tokens; leave it out for all of them")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p {self.top_p:g}: must be above 0 and at most 1; leave it out for all")

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that tokens are drawn from; [V] float64 for logits [V]."""
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(), logits.shape[0]).double()
        logits = logits.double()
        # Subtracting the largest first keeps a tiny temperature from making infinities.
        ordered, ids = ((logits - logits.max()) / self.temperature).sort(descending=True, stable=True)
        if self.top_k is not None:
            ordered[self.top_k :] = -torch.inf
        kept = ordered.softmax(0)
        if self.top_p is not None:
            before = kept.cumsum(0) - kept
            kept[1:].masked_fill_(before[1:] >= self.top_p, 0.0)
        return torch.zeros_like(kept).scatter_(0, ids, kept / kept.sum())

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """The next token for `logits` [V]; takes one number from `generator` (of the CPU) unless it is greedy.

        Raises:
            CheckpointError: the logits are not numbers.
        """
        logits = logits.cpu()
        if not logits.isfinite().all():
            raise CheckpointError("the model's output is not finite: the training diverged, or the weights are damaged")
        if self.temperature == 0:
            return int(logits.argmax())
        reached = self.probabilities(logits).cumsum(0)
        total = reached[-1]
        drawn = torch.rand((), dtype=torch.float64, generator=generator) * total
        # Below the total in spite of rounding, so that a token without any probability is never taken.
        drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))
        return int(torch.searchsorted(reached, drawn, right=True))
