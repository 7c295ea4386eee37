"""Schedules that jump: sampled profiles, releases from the peak (WSD-S), and TriLM's two steps."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.errors import ConfigError
from megacpt.optim.schedules import schedule_from_dict
from tests.optim.test_schedules import ENTRY, PEAK, SHAPES, STAGE, STEP, built, falling

KINDS: dict[str, dict[str, Any]] = {
    **{f"wsd {s}": {"kind": "wsd", "warmup": 0, "decay": "100%", "decay_shape": s} for s in SHAPES},
    **{f"anneal {s}": {"kind": "anneal", "shape": s} for s in SHAPES},
    "rex": {"kind": "rex", "warmup": "10%"},
    "linear": {"kind": "linear", "warmup": "10%"},
    "cosine": {"kind": "cosine", "warmup": "10%"},
    "infinite": {"kind": "infinite", "warmup": "10%", "cooldown": "70%"},
    "rewarmed_cosine": {"kind": "rewarmed_cosine", "warmup": "10%"},
}
every_kind = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS.keys())
tokens = st.integers(0, 2 * STAGE)


# Sampling.


def test_a_line_sampled_three_times_is_the_step_schedule() -> None:
    schedule = built({"kind": "linear", "warmup": 0, "min_lr": 0, "sampling": "200k tokens"}, stage=600_000)
    rates = [schedule.rate(step * STEP) for step in range(1, 601)]
    assert rates == [PEAK] * 200 + [pytest.approx(PEAK * 2 / 3)] * 200 + [pytest.approx(PEAK / 3)] * 200


def test_rex_at_its_known_points() -> None:
    schedule = built({"kind": "rex", "warmup": 0, "min_lr": 0})
    assert [schedule.rate(t) for t in (0, STAGE // 2, STAGE)] == [PEAK, pytest.approx(PEAK * 2 / 3), 0.0]


@every_kind
@given(token=tokens, steps=st.integers(2, 700))
def test_a_sampled_profile_holds_what_the_smooth_one_was(case: dict[str, Any], token: int, steps: int) -> None:
    smooth, sampled = built(case), built({**case, "sampling": f"{steps} steps"})
    piece = next(p for p in smooth.pieces(entry_rate=ENTRY) if p.phase in ("cooldown", "decay"))
    assert piece.stop is not None
    if token <= piece.start or (token > piece.stop and smooth.horizon_free):
        expected = smooth.rate(token, entry_rate=ENTRY)
    else:
        read = range(piece.start, min(token, piece.stop), steps * STEP)[-1]  # the last point before the step's end
        expected = smooth.rate(read, entry_rate=ENTRY)
    assert sampled.rate(token, entry_rate=ENTRY) == expected


@every_kind
@given(token=tokens)
def test_read_at_every_step_a_profile_is_smooth(case: dict[str, Any], token: int) -> None:
    assert built({**case, "sampling": "1 step"}) == built(case)
    assert built({**case, "sampling": "1000 tokens"}).rate(token, entry_rate=ENTRY) == built(case).rate(
        token, entry_rate=ENTRY
    )


# WSD-S.

RELEASES = {"kind": "wsd_s", "warmup": "1%", "releases": ["25%", "500 steps", "100%"], "decay": "10%"}
ENDS = (0, 250_000, 500_000, 1_000_000)


def wsd_s(t: int, shape: str = "reciprocal") -> float:
    """The rate of a step that ends at `t`, from Wen et al. 2024."""
    for start, stop in pairwise(ENDS):
        turn = stop - (stop - start) // 10
        if start < t <= stop:
            if t < 10_000:
                return PEAK * t / 10_000
            return PEAK if t <= turn else falling(shape, PEAK, 3e-5, (t - turn) / (stop - turn))
    return PEAK if t else 0.0


@pytest.mark.parametrize("shape", SHAPES)
@given(token=st.one_of(tokens, st.sampled_from([e + d for e in ENDS[1:] for d in (-1, 0, 1)])))
def test_every_release_is_decayed_and_the_peak_returns(shape: str, token: int) -> None:
    schedule = built({**RELEASES, "decay_shape": shape})
    assert schedule.rate(token) == pytest.approx(wsd_s(token, shape), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_releases_end_exactly_and_say_so(shape: str) -> None:
    schedule = built({**RELEASES, "decay_shape": shape})
    for end in ENDS[1:]:
        assert schedule.rate(end) == 3e-5
        assert schedule.rate(end + STEP) == PEAK
        assert [schedule.phase(end + d) for d in (-1, 0, 1)] == ["decay", "done", "constant"]


@given(token=tokens, stage=st.integers(1, 3 * STAGE))
def test_a_longer_run_has_the_same_releases(token: int, stage: int) -> None:
    schedule = built(RELEASES)
    assert schedule.horizon_free
    assert schedule.rate(token, stage) == schedule.rate(token)
    assert schedule.phase(token, stage) == schedule.phase(token)


@given(stage=st.integers(100 * STEP, STAGE), share=st.integers(20, 100))
def test_a_release_falls_on_the_end_of_a_step(stage: int, share: int) -> None:
    schedule = built({"kind": "wsd_s", "releases": [f"{share}%"]}, stage=stage)
    ((_, stop),) = schedule.releases
    assert stop % STEP == 0
    assert stop - STEP < stage * share / 100 <= stop + 1


def test_a_stage_that_is_no_whole_number_of_steps_ends_released() -> None:
    schedule = built({"kind": "wsd_s"}, stage=STAGE - 1)
    assert schedule.rate(STAGE, STAGE) == 3e-5
    assert schedule.phase(STAGE, STAGE) == "done"


# TriLM.

TRILM = {"kind": "trilm", "second_lr": 2e-4, "min_lr": 1e-5}


@given(token=st.one_of(tokens, st.integers(499_990, 500_010)), low=st.sampled_from([0, 1e-5]))
def test_the_line_comes_from_a_second_peak_in_the_second_half(token: int, low: float) -> None:
    t = min(token, STAGE)
    peak = PEAK if t <= 500_000 else 2e-4
    line = low + (peak - low) * (1 - (t - 10_000) / 990_000)
    expected = PEAK * t / 10_000 if t <= 10_000 else line
    rate = built({**TRILM, "min_lr": low}).rate(token)
    assert rate == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert rate == low or token < STAGE


def test_the_phases_of_two_steps() -> None:
    schedule = built(TRILM)
    points = (0, 10_000, 500_000, 500_001, STAGE - 1, STAGE)
    assert [schedule.phase(t) for t in points] == ["warmup", "decay", "decay", "decay", "decay", "done"]


@given(token=tokens, base=st.floats(0, 1))
def test_weight_decay_ends_after_two_thirds(token: int, base: float) -> None:
    assert built(TRILM).weight_decay(base, token) == (base if token <= 666_667 else 0.0)
    assert built({**TRILM, "weight_decay_until": None}).weight_decay(base, token) == base
    assert built({"kind": "cosine"}).weight_decay(base, token) == base
    assert built({"kind": "cosine", "weight_decay_until": 0}).weight_decay(base, token + 1) == 0


@pytest.mark.parametrize("shape", SHAPES)
@given(token=st.integers(0, STAGE), offset=st.sampled_from([0, 5 * STAGE]))
def test_two_steps_on_an_annealing_branch(shape: str, token: int, offset: int) -> None:
    case = {"kind": "anneal", "shape": shape, "drop": "40%", "drop_to": 0.5, "weight_decay_until": "300 steps"}
    schedule = built(case, offset=offset)
    first = ENTRY if token <= 400_000 else ENTRY / 2
    expected = falling(shape, first, 3e-5, token / STAGE)
    assert schedule.rate(token, entry_rate=ENTRY) == pytest.approx(expected, rel=1e-12)
    assert schedule.weight_decay(0.1, token) == (0.1 if token <= 300_000 else 0.0)
    assert schedule.rate(STAGE, entry_rate=ENTRY) == 3e-5


def test_a_drop_never_goes_below_the_end() -> None:
    schedule = built({"kind": "anneal", "shape": "linear", "drop": "40%", "drop_to": "1%"})
    assert {schedule.rate(t, entry_rate=ENTRY) for t in range(400_001, STAGE, 99_999)} == {3e-5}


# All of them.

JUMPS = {
    "wsd_s": RELEASES,
    "trilm": TRILM,
    "trilm, sampled": {**TRILM, "sampling": "90 steps"},
    "anneal": {"kind": "anneal", "drop": "40%", "sampling": "10%", "weight_decay_until": "50%"},
    "rex, sampled": {"kind": "rex", "sampling": "33.34%"},
}
every_jump = pytest.mark.parametrize("case", JUMPS.values(), ids=JUMPS.keys())


@every_jump
@given(token=tokens)
def test_saved_by_value(case: dict[str, Any], token: int) -> None:
    schedule = built(case, offset=123)
    saved = schedule.to_dict()
    assert json.loads(json.dumps(saved)) == saved
    again = schedule_from_dict(json.loads(json.dumps(saved)))
    assert again == schedule
    assert again.rate(token, entry_rate=ENTRY) == schedule.rate(token, entry_rate=ENTRY)
    assert again.phase(token, entry_rate=ENTRY) == schedule.phase(token, entry_rate=ENTRY)
    assert again.weight_decay(0.1, token) == schedule.weight_decay(0.1, token)


@every_jump
@given(a=tokens, b=tokens)
def test_between_jumps_up_the_rate_only_falls(case: dict[str, Any], a: int, b: int) -> None:
    schedule = built(case)
    a, b = sorted((a, b))
    for piece in schedule.pieces(entry_rate=ENTRY):
        inside = a > piece.lower and (piece.upper is None or b <= piece.upper)
        if inside and piece.phase != "warmup":
            assert schedule.rate(a, entry_rate=ENTRY) >= schedule.rate(b, entry_rate=ENTRY)
            assert piece.last <= schedule.rate(b, entry_rate=ENTRY) <= piece.first


@every_jump
def test_pieces_leave_no_gap(case: dict[str, Any]) -> None:
    for left, right in pairwise(built(case).pieces(entry_rate=ENTRY)):
        assert left.upper == right.lower


def test_a_schedule_from_before_these_fields_reads_as_one_without() -> None:
    schedule = built({"kind": "cosine"})
    old = schedule.to_dict()
    for name in ("sampling", "drop", "drop_to", "weight_decay_until", "releases"):
        del old[name]
    assert schedule_from_dict(old) == schedule


def test_an_entry_below_the_end_is_refused_with_a_drop_too() -> None:
    with pytest.raises(ConfigError, match="min_lr"):
        built(JUMPS["anneal"]).rate(0, entry_rate=1e-5)
