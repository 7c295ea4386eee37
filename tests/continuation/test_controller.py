"""What a controller makes of held-out losses."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config import RetentionConfig
from megacpt.continuation.controller import Controller, State, build_controller, watched_streams
from tests.small import run_config


def _retention(**settings: object) -> Controller:
    return build_controller(RetentionConfig.model_validate(settings))


def _after(controller: Controller, share: float, *losses: dict[str, float]) -> State:
    state = controller.begin(share, losses[0])
    for step, found in enumerate(losses[1:], 1):
        state = controller.decide(state, step, found)
    return state


def test_up_above_the_target_and_down_below_half_of_it() -> None:
    rises = [0.03, 0.021, 0.02, 0.015, 0.01, 0.009, -0.5, 0.021]
    start = {"english": 2.0, "c": 1.0}
    # On the mean over both streams.
    later = [{"english": 2.0 + 2 * rise, "c": 1.0} for rise in rises]
    state = _after(_retention(), 0.05, start, *later)
    assert [decision["rise"] for decision in state["decisions"]] == rises
    assert [decision["share"] for decision in state["decisions"]] == [0.06, 0.07, 0.07, 0.07, 0.07, 0.06, 0.05, 0.06]
    assert [decision["step"] for decision in state["decisions"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert state["share"] == 0.06
    assert state["reference"] == start


def test_the_share_stays_in_its_limits() -> None:
    controller = _retention(step="15%", min="10%", max="30%")
    up = _after(controller, 0.2, {"a": 1.0}, *({"a": 2.0} for _ in range(3)))
    assert [decision["share"] for decision in up["decisions"]] == [0.3, 0.3, 0.3]
    down = _after(controller, 0.2, {"a": 1.0}, *({"a": 1.0} for _ in range(3)))
    assert [decision["share"] for decision in down["decisions"]] == [0.1, 0.1, 0.1]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_is_no_number_decides_nothing(loss: float) -> None:
    assert _after(_retention(), 0.05, {"a": 1.0}, {"a": loss})["decisions"] == []
    assert _after(_retention(), 0.05, {"a": 1.0}, {})["decisions"] == []


@given(
    st.lists(st.floats(1.0, 1.2), min_size=2, max_size=20),
    st.floats(-1e-6, 1e-6),
)
def test_what_layouts_differ_by_decides_nothing(losses: list[float], noise: float) -> None:
    """Losses that do not stand just between two thousandths."""
    losses = [round(loss, 3) for loss in losses]
    controller = _retention(step="1%")
    exact = _after(controller, 0.25, *({"a": loss} for loss in losses))
    assert _after(controller, 0.25, *({"a": loss + noise} for loss in losses)) == exact


@given(st.lists(st.floats(0, 3, allow_subnormal=False), min_size=3, max_size=12), st.integers(1, 10))
def test_the_state_goes_through_json(losses: list[float], cut: int) -> None:
    controller = _retention()
    whole = _after(controller, 0.1, *({"a": loss} for loss in losses))
    state = json.loads(json.dumps(_after(controller, 0.1, *({"a": loss} for loss in losses[: cut + 1]))))
    for step, loss in enumerate(losses[cut + 1 :], cut + 1):
        state = controller.decide(state, step, {"a": loss})
    assert state == whole


def test_steps_there_and_back_meet_again() -> None:
    controller = _retention(step="0.1%")
    high, low = {"a": 2.0}, {"a": 1.0}
    state = _after(controller, 0.3, low, *[high] * 50, *[low] * 50)
    assert state["share"] == 0.3


def test_the_streams_that_it_goes_by() -> None:
    config = run_config("run", {"c": "data/c"}, evaluate={"streams": {"english": "e", "c": "data/c-valid", "web": "w"}})
    assert watched_streams(config) == ["english", "web"]
