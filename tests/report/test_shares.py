from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.plan import Phase, Segment, Source, StagePlan
from megacpt.report.record import load_run
from megacpt.report.shares import mixtures, plan_shares
from tests.report.lab import STEP, Lab


def plan(*phases: Phase, weights: tuple[float, ...] = (3.0, 1.0)) -> StagePlan:
    segment = (Segment(1, 64, 0, None),)
    sources = (Source(f"s{n}", f"s{n}", f"hash{n}", "new", None, w, segment) for n, w in enumerate(weights))
    return StagePlan(64, 1, tuple(sources), phases)


def test_without_phases_the_shares_stay() -> None:
    assert plan_shares(plan(), 100) == [(0, (0.75, 0.25)), (100, (0.75, 0.25))]


def test_a_jump_and_a_ramp() -> None:
    found = plan_shares(plan(Phase(20, (1.0, 1.0)), Phase(40, (0.0, 2.0), 20)), 100)
    assert found == [
        (0, (0.75, 0.25)),
        (20, (0.75, 0.25)),
        (20, (0.5, 0.5)),
        (40, (0.5, 0.5)),
        (60, (0.0, 1.0)),
        (100, (0.0, 1.0)),
    ]


def test_a_ramp_that_the_next_phase_or_the_end_interrupts() -> None:
    found = plan_shares(plan(Phase(0, (0.25, 0.75), 40), Phase(20, (1.0, 0.0), 400)), 120)
    assert found == [(0, (0.75, 0.25)), (20, (0.5, 0.5)), (120, (0.625, 0.375))]


def test_phases_behind_the_end_are_not_reached_yet() -> None:
    assert plan_shares(plan(Phase(50, (1.0, 0.0))), 50) == plan_shares(plan(), 50)


@given(
    st.lists(st.tuples(st.integers(0, 200), st.floats(0.1, 1), st.floats(0.1, 1), st.integers(0, 100)), max_size=5),
    st.integers(1, 200),
)
def test_shares_sum_to_one_and_places_never_fall(phases: list[tuple[int, float, float, int]], samples: int) -> None:
    known = {start: Phase(start, (a, b), ramp) for start, a, b, ramp in phases}
    found = plan_shares(plan(*(known[start] for start in sorted(known))), samples)
    places = [place for place, _ in found]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, samples)
    assert all(sum(shares) == pytest.approx(1) and min(shares) >= 0 for _, shares in found)


def test_the_mixture_of_a_line_names_replay_by_its_stream(lab: Lab) -> None:
    curves = {"english": (8.0, 2.0), "python": (5.0, 4.0)}
    first = lab.run("first", "english", curves, steps=20)
    phases = (Phase(160, (0.5, 0.5)),)
    second = lab.run("second", "python", curves, first, steps=20, replay=0.25, phases=phases)
    english, python = mixtures(load_run(second).ledger.stages)
    assert (english.streams, english.replayed, english.phases) == (("english",), (False,), False)
    assert (python.streams, python.replayed, python.phases) == (("python", "english"), (False, True), True)
    assert python.points == (
        (20 * STEP, (0.75, 0.25)),
        (20 * STEP + 160 * 64, (0.75, 0.25)),
        (20 * STEP + 160 * 64, (0.5, 0.5)),
        (40 * STEP, (0.5, 0.5)),
    )


def test_stages_that_read_nothing_have_no_mixture(lab: Lab) -> None:
    stage = load_run(lab.run("first", "english", {"english": (8.0, 2.0)}, steps=20)).ledger.stage
    assert mixtures([replace(stage, tokens=0)]) == []
    assert Path(stage.run).name == "first"
