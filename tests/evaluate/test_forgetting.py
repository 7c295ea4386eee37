from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.evaluate.forgetting import (
    average,
    average_loss,
    backward_transfer,
    change,
    forgetting,
    forward_transfer,
    learned,
    maximum,
)

# English first, then Python, then C; the held-out news are never trained on.
HOMES = {"english": 0, "python": 1, "c": 2}
START = {"english": 8.0, "python": 5.0, "c": 6.0, "news": 7.0}
LOSSES = [
    {"english": 2.0, "python": 4.0, "c": 4.5, "news": 2.5},
    {"english": 1.75, "python": 1.5, "c": 4.0, "news": 2.25},
    {"english": 2.5, "python": 1.5, "c": 1.25, "news": 2.75},
]


def test_forgetting_is_measured_from_the_best_stage_before() -> None:
    assert forgetting(LOSSES, HOMES) == [{}, {"english": -0.25}, {"english": 0.75, "python": 0.0}]


def test_change_is_measured_from_the_end_of_the_own_stage() -> None:
    assert change(LOSSES, HOMES) == [{}, {"english": -0.25}, {"english": 0.5, "python": 0.0}]


def test_averages() -> None:
    last = forgetting(LOSSES, HOMES)[-1]
    assert average(last) == 0.375
    assert backward_transfer(LOSSES, HOMES) == -0.25
    assert average({}) is None
    assert backward_transfer(LOSSES[:1], HOMES) is None
    assert backward_transfer([], HOMES) is None


def test_the_largest_of_a_row() -> None:
    assert maximum(forgetting(LOSSES, HOMES)[-1]) == ("english", 0.75)
    assert maximum({"a": -0.5, "b": -0.25}) == ("b", -0.25)
    assert maximum({}) is None
    assert maximum({"a": math.nan, "b": 1.0})[0] == "a"  # type: ignore[index]


def test_the_average_loss_is_that_of_the_streams_trained_on_so_far() -> None:
    assert average_loss(LOSSES, HOMES) == [2.0, 1.625, 1.75]
    assert average_loss([{"news": 2.0}], HOMES) == [None]


def test_what_a_stream_gained_in_its_own_stage_and_before() -> None:
    assert learned(LOSSES, HOMES, START) == {"english": 6.0, "python": 2.5, "c": 2.75}
    assert forward_transfer(LOSSES, HOMES, START) == {"python": 1.0, "c": 2.0}


def test_what_was_not_measured_before_its_own_stage_is_left_out() -> None:
    assert learned(LOSSES, HOMES, {}) == {"python": 2.5, "c": 2.75}
    assert forward_transfer(LOSSES, HOMES, {"c": 6.0}) == {"c": 2.0}


def test_a_stream_counts_from_where_it_was_measured() -> None:
    losses = [{"python": 4.0}, {"english": 2.0, "python": 1.5}, {"english": 2.5}]
    assert forgetting(losses, HOMES) == [{}, {}, {"english": 0.5}]
    assert change(losses, HOMES) == [{}, {}, {}]


def test_a_loss_that_is_not_a_number_is_not_passed_over() -> None:
    losses = [{"english": math.nan}, {"english": 2.0}, {"english": 2.0}]
    assert [math.isnan(row["english"]) for row in forgetting(losses, HOMES)[1:]] == [True, True]


matrices = st.lists(
    st.fixed_dictionaries({name: st.floats(0.5, 8.0) for name in ("english", "python", "c")}), min_size=1, max_size=6
)


@given(matrices, st.floats(-0.25, 0.25))
def test_a_shift_of_all_losses_changes_nothing(losses: list[dict[str, float]], shift: float) -> None:
    shifted = [{stream: loss + shift for stream, loss in row.items()} for row in losses]
    for row, other in zip(forgetting(losses, HOMES), forgetting(shifted, HOMES), strict=True):
        assert row.keys() == other.keys()
        assert all(row[stream] == pytest.approx(other[stream], abs=1e-9) for stream in row)


@given(matrices)
def test_forgetting_is_at_least_the_change_since_the_own_stage(losses: list[dict[str, float]]) -> None:
    for row, other in zip(forgetting(losses, HOMES), change(losses, HOMES), strict=True):
        assert row.keys() == other.keys()
        assert all(row[stream] >= other[stream] for stream in row)


@given(st.lists(st.floats(0.5, 8.0), min_size=2, max_size=6))
def test_a_stream_that_only_gets_better_is_never_forgotten(values: list[float]) -> None:
    losses = [{"english": value} for value in sorted(values, reverse=True)]
    assert all(row["english"] <= 0 for row in forgetting(losses, {"english": 0})[1:])
    transfer = backward_transfer(losses, {"english": 0})
    assert transfer is not None
    assert transfer >= 0
