"""What QuEST rounds with: the Walsh-Hadamard transform, and the range that suits a Gaussian (arXiv 2502.05003)."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


def transform(x: Tensor, length: int) -> Tensor:
    """Transform consecutive vectors of the last dimension by the orthonormal Walsh-Hadamard matrix, its own inverse.

    The additions are made in the same order whatever surrounds a vector, so that it comes out the same on every rank.

    Args:
        x: [.., n].
        length: of a vector, a power of 2 that divides n.

    Returns:
        [.., n] float32, or float64 for float64.
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, length)
    half = 1
    while half < length:
        first, second = y.view(-1, length // (2 * half), 2, half).unbind(2)
        y = torch.stack((first + second, first - second), 2).view(-1, length)
        half *= 2
    return (y / math.sqrt(length)).view(x.shape)


@cache
def gaussian_clip(bits: int) -> float:
    """The outermost level of 2^bits evenly spaced ones, for the least mean squared error of a standard Gaussian.

    Max 1960 (Quantizing for minimum distortion, table II) lists the steps.
    """
    levels = 1 << bits
    low, high = 0.0, 4.0
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-12:  # golden section; the error has one minimum
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if _error(left, levels) < _error(right, levels) else (left, high)
    return (low + high) / 2 * (levels - 1) / 2


def _error(step: float, levels: int) -> float:
    """Mean squared distance of a standard Gaussian to the nearest of evenly spaced levels around 0."""
    total = 0.0
    for k in range(levels // 2):
        level, left = (k + 0.5) * step, k * step
        right = math.inf if k == levels // 2 - 1 else left + step
        total += 2 * _distance(level, left, right)
    return total


def _distance(level: float, left: float, right: float) -> float:
    """The integral of (x - level)^2 under the density of a standard Gaussian."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def moment(x: float) -> float:  # x times its density
        return 0.0 if math.isinf(x) else x * density(x)

    mass = (math.erf(right / math.sqrt(2)) - math.erf(left / math.sqrt(2))) / 2
    first = density(left) - density(right)
    second = mass + moment(left) - moment(right)
    return second - 2 * level * first + level * level * mass
