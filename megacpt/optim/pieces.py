"""The curves that schedules are made of: profiles between two rates, and how often a profile is read.

Sources of the profiles: Singh et al. 2025 (arXiv 2503.02844), eq. 1 (exponential, inverse square root); Hägele et al.
2024 (arXiv 2405.18392) for 1 - sqrt; Chen et al. 2021 (REX, arXiv 2107.04197), who also tell the profile from the rate
at which it is sampled; Wen et al. 2024 (WSD-S, arXiv 2410.05192) for the reciprocal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["warmup", "cooldown", "constant", "decay", "done"]
Shape = Literal["linear", "cosine", "exponential", "sqrt", "inverse_sqrt", "rex", "reciprocal"]

NEVER_ZERO: tuple[Shape, ...] = ("exponential", "reciprocal")
"""Shapes that cannot end at a rate of 0."""

# The share of the difference between both rates that is gone at progress p, 0 < p < 1.
_SHARES: dict[Shape, Callable[[float], float]] = {
    "linear": lambda p: p,
    "cosine": lambda p: 0.5 * (1.0 - math.cos(math.pi * p)),
    "sqrt": math.sqrt,
    "rex": lambda p: p / (2.0 - p),  # 1 - (1 - p) / (1 - p/2)
}


@dataclass(frozen=True)
class Piece:
    """One curve: from rate `first` at token `start` to rate `last` at token `stop` (None: `first` for ever).

    Attributes:
        phase: what it is part of.
        start: token at which the curve begins.
        stop: token at which it ends.
        first: rate at `start`.
        last: rate at `stop`.
        shape: profile.
        alpha: steepness of `inverse_sqrt`.
        sampling: the profile is read every so many tokens from `start` and held in between; 0 reads it everywhere.
        begin: token from which this curve is the schedule's; None: `start`.
        end: token up to which it is; None: `stop`.
    """

    phase: Phase
    start: int
    stop: int | None
    first: float
    last: float
    shape: Shape = "linear"
    alpha: float = 10.0
    sampling: int = 0
    begin: int | None = None
    end: int | None = None

    @property
    def lower(self) -> int:
        """The token behind which this curve is the schedule's."""
        return self.start if self.begin is None else self.begin

    @property
    def upper(self) -> int | None:
        """The last token at which it is; None: no end."""
        return self.stop if self.end is None else self.end

    def rate(self, token: int) -> float:
        """The rate at `token`; exactly `first` up to `start`, and exactly `last` from `stop` on (if not sampled)."""
        if self.stop is None or token <= self.start or self.first == self.last:
            return self.first
        token = min(token, self.stop)
        if self.sampling:
            # A step that ends at `token` was made with the value read at or before its start.
            token = self.start + (token - self.start - 1) // self.sampling * self.sampling
        if token == self.start:
            return self.first
        if token == self.stop:
            return self.last
        value = self._profile((token - self.start) / (self.stop - self.start))
        low, high = sorted((self.first, self.last))
        return min(max(value, low), high)  # rounding must not step outside the two ends

    def _profile(self, progress: float) -> float:
        if self.shape == "exponential":
            return self.first * math.pow(self.last / self.first, progress)
        if self.shape == "reciprocal":
            return 1.0 / (progress / self.last + (1.0 - progress) / self.first)
        if self.shape == "inverse_sqrt":
            return self.first + (self.last - self.first) * self._h(progress) / self._h(1.0)
        return self.first + (self.last - self.first) * _SHARES[self.shape](progress)

    def _h(self, progress: float) -> float:
        """Singh et al. (2025): h(p) = 1/sqrt(1 + alpha p) - 1."""
        return 1.0 / math.sqrt(1.0 + self.alpha * progress) - 1.0
