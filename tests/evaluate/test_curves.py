from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.evaluate.curves import Gap, stability_gap, windowed_forgetting, windowed_plasticity, worst_since


def gap(steps: list[float], losses: list[float]) -> dict[str, float]:
    found = stability_gap(steps, losses)
    assert found is not None
    return vars(found)


def expected(*values: float) -> object:
    return pytest.approx(vars(Gap(*values)))


def test_a_rise_that_is_won_back_wholly() -> None:
    # Nine tenths of the rise of 1 are won back at 2.1: 0.8 of the way from step 4 to step 8.
    # Area: 0.25 to step 1, 0.75 to 2, 1.5 to 4, and (0.5 + 0.1) / 2 over the 3.2 steps to 7.2.
    found = gap([0, 1, 2, 4, 8], [2.0, 2.5, 3.0, 2.5, 2.0])
    assert found == expected(2.0, 1.0, 1.0, 2, 7.2, 0.25 + 0.75 + 1.5 + 0.96, 0.0)


def test_a_rise_that_is_won_back_in_part() -> None:
    # The stream comes back to 2.4 only; up to there the curve is above 2.4 from step 0.4 on: a triangle of 0.18.
    found = gap([0, 1, 2, 3], [2.0, 3.0, 2.4, 2.5])
    assert found == expected(2.0, 1.0, 0.6, 1, 1.9, 0.18 + (0.6 + 0.06) / 2 * 0.9, 0.5)


def test_a_stream_that_becomes_better_than_before() -> None:
    # What falls below the level at the boundary is gained, and no part of the gap.
    assert gap([0, 2, 4], [2.0, 3.0, 1.0]) == expected(2.0, 1.0, 1.0, 2, 2.9, 1.0 + (1 + 0.1) / 2 * 0.9, -1.0)


def test_the_gap_after_the_boundary_is_found_though_the_stream_is_forgotten_later() -> None:
    found = gap([0, 1, 10, 1000], [2.0, 2.5, 2.1, 2.7])
    assert (found["depth"], found["peak"], found["rise"], found["lasting"]) == pytest.approx((0.4, 1, 0.7, 0.7))


def test_steps_count_from_the_boundary() -> None:
    shifted = gap([100, 101, 102, 104, 108], [2.0, 2.5, 3.0, 2.5, 2.0])
    assert shifted == pytest.approx(gap([0, 1, 2, 4, 8], [2.0, 2.5, 3.0, 2.5, 2.0]))


@pytest.mark.parametrize(("losses", "rise", "lasting"), [([2.0, 2.5, 3.0], 1.0, 1.0), ([2.0, 1.5, 1.0], 0.0, -1.0)])
def test_what_only_rises_or_falls_has_no_gap(losses: list[float], rise: float, lasting: float) -> None:
    assert gap([0, 1, 2], losses) == expected(2.0, rise, 0.0, 0.0, 0.0, 0.0, lasting)


def test_a_flat_curve_has_no_gap() -> None:
    assert gap([0, 4], [2.0, 2.0]) == expected(2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_nothing_measured_after_the_boundary() -> None:
    assert stability_gap([], []) is None
    assert stability_gap([7], [2.0]) is None


@pytest.mark.parametrize("wild", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_not_passed_over(wild: float) -> None:
    assert all(math.isnan(value) for value in gap([0, 1, 2], [2.0, wild, 2.0]).values())


curves = st.lists(st.tuples(st.integers(1, 64), st.floats(0.5, 8.0)), min_size=2, max_size=24).map(
    lambda pairs: ([sum(step for step, _ in pairs[:i]) for i in range(len(pairs))], [loss for _, loss in pairs])
)
Curve = tuple[list[float], list[float]]


@given(curves)
def test_the_depth_is_the_largest_part_of_a_rise_that_is_won_back(curve: Curve) -> None:
    steps, losses = curve
    pairs = [(losses[p] - max(losses[q], losses[0])) for p in range(len(losses)) for q in range(p, len(losses))]
    found = gap(steps, losses)
    assert found["depth"] == max(0.0, *pairs)
    assert found["depth"] <= found["rise"]
    assert 0 <= found["peak"] <= found["duration"] <= steps[-1] - steps[0]
    assert 0 <= found["area"] <= found["rise"] * found["duration"] + 1e-9


@given(curves, st.sampled_from([0.5, 2.0, 4.0]), st.sampled_from([-0.25, 0.0, 0.5]))
def test_a_gap_scales_with_its_axes(curve: Curve, scale: float, shift: float) -> None:
    steps, losses = curve
    found, other = gap(steps, losses), gap([scale * step for step in steps], [loss + shift for loss in losses])
    factors = {"peak": scale, "duration": scale, "area": scale}
    for name in found.keys() - {"before"}:
        assert other[name] == pytest.approx(found[name] * factors.get(name, 1.0), abs=1e-6, rel=1e-6)


@given(curves)
def test_more_points_on_the_same_lines_change_nothing(curve: Curve) -> None:
    steps, losses = curve
    fine_steps, fine_losses = [float(steps[0])], [losses[0]]
    for i in range(1, len(steps)):
        fine_steps += [(steps[i - 1] + steps[i]) / 2, steps[i]]
        fine_losses += [(losses[i - 1] + losses[i]) / 2, losses[i]]
    assert gap(fine_steps, fine_losses) == pytest.approx(gap(steps, losses), abs=1e-6)


def test_the_worst_case_counts_from_after_the_own_stage() -> None:
    steps, losses = [0, 10, 10, 11, 12, 20], [5.0, 2.0, 2.0, 2.75, 2.5, 1.75]
    assert worst_since(steps, losses, 10) == (2.75, 11)
    assert worst_since(steps, losses, 12) == (1.75, 20)
    assert worst_since(steps, losses, 20) is None
    found = worst_since(steps, [*losses[:-1], math.nan], 10)
    assert found is not None
    assert math.isnan(found[0])


@pytest.mark.parametrize(("window", "rise", "fall"), [(1, 0.5, 0.4), (2, 0.5, 0.4), (8, 0.65, 0.4), (10, 0.75, 0.4)])
def test_windows(window: int, rise: float, fall: float) -> None:
    steps, losses = [0, 1, 2, 10], [2.0, 2.5, 2.1, 2.75]
    assert windowed_forgetting(steps, losses, window) == pytest.approx(rise)
    assert windowed_plasticity(steps, losses, window) == pytest.approx(fall)


def test_windows_without_two_measurements_say_nothing() -> None:
    assert windowed_forgetting([0, 100], [2.0, 3.0], 64) is None
    assert windowed_plasticity([], [], 64) is None
    assert windowed_forgetting([0, 1], [3.0, 2.0], 64) == 0.0  # measured, and it never rose
    assert math.isnan(windowed_forgetting([0, 1], [3.0, math.nan], 64) or 0.0)


@given(curves, st.integers(1, 100))
def test_a_window_finds_the_largest_rise_of_all_pairs(curve: Curve, window: int) -> None:
    steps, losses = curve
    rises = [losses[n] - losses[m] for m, n in combinations(range(len(steps)), 2) if steps[n] - steps[m] <= window]
    assert windowed_forgetting(steps, losses, window) == (max(0.0, *rises, 0.0) if rises else None)
    assert windowed_plasticity(steps, losses, window) == (max(0.0, *(-rise for rise in rises), 0.0) if rises else None)
