"""How certain a mean over few seeds is: Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and the interval that covers the truth with probability `LEVEL`, if the values are normal.

    Attributes:
        mean: over the seeds.
        low: end of the interval; None for a single value.
        high: end of the interval; None for a single value.
    """

    mean: float
    low: float | None
    high: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and interval of `values`: mean +- t s / sqrt(n), with n - 1 degrees of freedom (Student 1908)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, None, None)
    half = t_quantile(LEVEL, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def t_quantile(level: float, freedom: int) -> float:
    """Return the t with ``P(|T| < t) = level`` for T with `freedom` degrees of freedom."""
    low, high = 0.0, 1.0
    while t_coverage(high, freedom) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_coverage(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def t_coverage(t: float, freedom: int) -> float:
    """Return ``P(|T| < t)`` by the finite sums of Abramowitz and Stegun 1964, 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total
