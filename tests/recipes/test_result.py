"""How certain a finding is, and what is said of it."""

from __future__ import annotations

import math
import random

import pytest

from megacpt.recipes.result import verdict
from megacpt.recipes.statistics import Estimate, estimate, t_coverage, t_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # of Student's t, two-sided 95 %, as tabulated
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (30, 2.04227), (120, 1.97993)],
)
def test_quantiles_are_the_tabulated_ones(freedom: int, quantile: float) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(quantile, abs=5e-5)


@pytest.mark.parametrize("freedom", [1, 2, 3, 6, 7])
def test_coverage_is_the_integral_of_the_density(freedom: int) -> None:
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    n, end = 20_000, 2.5
    points = ((k + 0.5) * end / n for k in range(n))
    area = 2 * sum(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in points) * end / n
    assert t_coverage(end, freedom) == pytest.approx(area, abs=1e-7)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    draw = random.Random(0)
    trials, inside = 4000, 0
    for _ in range(trials):
        found = estimate([draw.gauss(1.5, 2.0) for _ in range(3)])
        assert found.low is not None
        assert found.high is not None
        inside += found.low < 1.5 < found.high
    assert inside / trials == pytest.approx(0.95, abs=0.012)  # 3.5 standard deviations


def test_one_value_has_no_interval() -> None:
    assert estimate([0.25]) == Estimate(0.25, None, None)


@pytest.mark.parametrize(
    ("expected", "mean", "low", "high", "said"),
    [
        ("below 0", -2, -3, -1, "as claimed"),
        ("below 0", -2, -5, 1, "as claimed, not certain"),
        ("below 0", 2, -1, 5, "opposite sign, not certain"),
        ("below 0", 2, 1, 3, "opposite sign"),
        ("above 0", 2, 1, 3, "as claimed"),
        ("above 0", -2, -3, -1, "opposite sign"),
        ("above 0", 2, None, None, "as claimed, not certain"),
        ("within 1", 0.5, 0.2, 0.8, "as claimed"),
        ("within 1", 0.5, -0.2, 1.2, "as claimed, not certain"),
        ("within 1", -2, -3, 0, "larger than claimed, not certain"),
        ("within 1", -2, -3, -1.5, "larger than claimed"),
    ],
)
def test_verdicts(expected: str, mean: float, low: float | None, high: float | None, said: str) -> None:
    assert verdict(expected, Estimate(mean, low, high)) == said
