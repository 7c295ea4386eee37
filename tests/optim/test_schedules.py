"""Schedules: equations of the papers, joints, exact ends, horizon independence, and saving by value."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from megacpt.config import ScheduleConfig
from megacpt.errors import CheckpointError, ConfigError
from megacpt.optim.building import build_schedule
from megacpt.optim.schedules import Schedule, schedule_from_dict

PEAK, STEP, STAGE, ENTRY = 3e-4, 1_000, 1_000_000, 1.65e-4
SHAPES = ("exponential", "linear", "cosine", "sqrt", "rex", "reciprocal")

CASES: dict[str, dict[str, Any]] = {
    "constant": {"kind": "constant", "warmup": "2%"},
    "constant, cold": {"kind": "constant", "warmup": 0},
    "linear": {"kind": "linear", "warmup": "5 steps", "min_lr": "10%"},
    "cosine": {"kind": "cosine", "warmup": "1%", "min_lr": 3e-5},
    "cosine to 0": {"kind": "cosine", "warmup": 0, "min_lr": 0},
    "rex": {"kind": "rex", "warmup": "2%", "min_lr": 3e-5},
    "rex to 0": {"kind": "rex", "warmup": 0, "min_lr": 0},
    "wsd without decay": {"kind": "wsd", "decay": 0},
    "rewarmed_cosine": {"kind": "rewarmed_cosine", "warmup": "1%", "min_lr": "10%"},
    **{f"wsd {s}": {"kind": "wsd", "decay": "20%", "decay_shape": s, "min_lr": "10%"} for s in SHAPES},
    **{
        f"infinite {s}": {"kind": "infinite", "cooldown": "60%", "cooldown_shape": s, "constant_lr": "55%"}
        for s in ("cosine", "inverse_sqrt", "linear")
    },
    "infinite, cold": {"kind": "infinite", "warmup": 0, "cooldown": 0, "constant_lr": "55%"},
    **{f"anneal {s}": {"kind": "anneal", "shape": s, "min_lr": "10%"} for s in SHAPES},
}


def built(case: dict[str, Any], stage: int = STAGE, offset: int = 0) -> Schedule:
    cfg = TypeAdapter(ScheduleConfig).validate_python(case)
    return build_schedule(cfg, PEAK, stage, STEP, offset)


every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def papers(case: dict[str, Any], t: int, entry: float = ENTRY) -> float:
    """The rate at token `t` of a stage of STAGE tokens, written from the papers."""
    kind, low = case["kind"], 3e-5
    if case.get("min_lr") == 0:
        low = 0.0
    warmup = {"1%": 10_000, "2%": 20_000, "5 steps": 5_000, 0: 0}[case.get("warmup", "1%")]
    if kind == "anneal":
        return falling(case["shape"], ENTRY, low, t / STAGE)
    if t < warmup:
        start = entry if kind == "rewarmed_cosine" else 0.0
        return start + (PEAK - start) * t / warmup
    if kind == "infinite":
        return infinite(case, t, warmup)
    if kind == "wsd":
        stable = t <= 800_000 or case["decay"] == 0
        return PEAK if stable else falling(case["decay_shape"], PEAK, low, (t - 800_000) / 200_000)
    if kind == "constant":
        return PEAK
    r = min((t - warmup) / (STAGE - warmup), 1.0)
    if kind == "rex":
        return falling("rex", PEAK, low, r)
    if kind == "linear":
        return PEAK - (PEAK - low) * r
    return low + (PEAK - low) / 2 * (math.cos(math.pi * r) + 1)  # Ibrahim et al. 2024, eq. 2


def infinite(case: dict[str, Any], t: int, warmup: int) -> float:
    """Singh et al. 2025: cumulative end points, so the cooldown of 60 % ends at 60 % of the stage."""
    high, constant, end = 3e-4, 1.65e-4, 600_000 if case["cooldown"] == "60%" else 0
    if t >= end:
        return constant
    p = (t - warmup) / (end - warmup)
    if case["cooldown_shape"] == "cosine":
        return constant + (high - constant) / 2 * (1 + math.cos(math.pi * p))
    if case["cooldown_shape"] == "linear":
        return high + (constant - high) * p
    return high + (constant - high) / (1 / math.sqrt(11) - 1) * (1 / math.sqrt(1 + 10 * p) - 1)


def falling(shape: str, high: float, low: float, r: float) -> float:
    r = min(r, 1.0)
    return {
        "exponential": high * math.exp(-math.log(high / low) * r) if low else 0.0,
        "reciprocal": 1 / (r / low + (1 - r) / high) if low else 0.0,  # Wen et al. 2024
        "rex": low + (high - low) * (1 - r) / (1 - r / 2),  # Chen et al. 2021
        "linear": high * (1 - r) + low * r,
        "cosine": low + (high - low) / 2 * (1 + math.cos(math.pi * r)),
        "sqrt": low + (high - low) * (1 - math.sqrt(r)),
    }[shape]


@every_case
@given(token=st.integers(0, 2 * STAGE))
def test_agrees_with_the_papers(case: dict[str, Any], token: int) -> None:
    rate = built(case).rate(token, entry_rate=ENTRY)
    assert rate == pytest.approx(papers(case, token), rel=1e-12, abs=1e-18)


@every_case
def test_joints_are_continuous_and_exact(case: dict[str, Any]) -> None:
    schedule = built(case)
    pieces = schedule.pieces(entry_rate=ENTRY)
    for left, right in pairwise(pieces):
        assert left.stop == right.start
        assert left.last == right.first == schedule.rate(right.start, entry_rate=ENTRY)
        slope = abs(left.last - left.first) / (left.stop - left.start)
        before = schedule.rate(right.start - 1, entry_rate=ENTRY)
        assert abs(before - right.first) <= 2 * slope + 1e-18


@every_case
def test_ends_are_exact(case: dict[str, Any]) -> None:
    schedule = built(case)
    ends = {"constant": PEAK, "infinite": 1.65e-4, "wsd": 3e-5 if case.get("decay") else PEAK}
    low = 0.0 if case.get("min_lr") == 0 else 3e-5
    assert schedule.rate(STAGE, entry_rate=ENTRY) == ends.get(case["kind"], low)
    starts = {"anneal": ENTRY, "rewarmed_cosine": ENTRY}
    cold = PEAK if case.get("cooldown") != 0 else 1.65e-4
    first = cold if case.get("warmup") == 0 else 0.0
    assert schedule.rate(0, entry_rate=ENTRY) == starts.get(case["kind"], first)


@every_case
@given(a=st.integers(0, STAGE), b=st.integers(0, STAGE))
def test_every_piece_is_monotone(case: dict[str, Any], a: int, b: int) -> None:
    a, b = sorted((a, b))
    for piece in built(case).pieces(entry_rate=ENTRY):
        rise = piece.rate(b) - piece.rate(a)
        assert rise >= 0 if piece.last > piece.first else rise <= 0


@every_case
@given(token=st.integers(0, 2 * STAGE))
def test_saved_by_value(case: dict[str, Any], token: int) -> None:
    schedule = built(case, offset=123)
    again = schedule_from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule
    assert again.rate(token, entry_rate=ENTRY) == schedule.rate(token, entry_rate=ENTRY)
    assert again.phase(token, entry_rate=ENTRY) == schedule.phase(token, entry_rate=ENTRY)


@every_case
@given(token=st.integers(0, 2 * STAGE), stage=st.integers(STAGE // 2, 10 * STAGE))
def test_only_horizon_free_kinds_ignore_the_stage_length(case: dict[str, Any], token: int, stage: int) -> None:
    schedule = built(case)
    if schedule.horizon_free:
        assert schedule.rate(token, stage) == schedule.rate(token)
        assert schedule.phase(token, stage) == schedule.phase(token)
    else:
        assert schedule.phase(stage, stage, ENTRY) == "done"
        assert schedule.phase(stage - 1, stage, ENTRY) == "decay"


def test_which_kinds_are_horizon_free() -> None:
    free = {name for name, case in CASES.items() if built(case).horizon_free}
    assert free == {name for name in CASES if name.startswith(("constant", "infinite", "wsd without"))}


@pytest.mark.parametrize(
    ("name", "phases"),
    [
        ("infinite cosine", ["warmup", "cooldown", "cooldown", "constant", "constant"]),
        ("wsd sqrt", ["warmup", "constant", "constant", "decay", "done"]),
        ("cosine", ["warmup", "decay", "decay", "decay", "done"]),
        ("anneal exponential", ["decay", "decay", "decay", "decay", "done"]),
        ("constant", ["warmup", "warmup", "constant", "constant", "constant"]),
    ],
)
def test_phases(name: str, phases: list[str]) -> None:
    schedule = built(CASES[name])
    points = [9_999, 10_000, 599_999, 900_000, STAGE]
    assert [schedule.phase(t, entry_rate=ENTRY) for t in points] == phases


@given(spent=st.integers(0, STAGE), token=st.integers(0, STAGE))
def test_a_trunk_goes_on_where_it_stopped(spent: int, token: int) -> None:
    trunk = built(CASES["infinite cosine"])
    later = replace(trunk, offset=spent)
    assert later.rate(token, 5 * STAGE) == trunk.rate(spent + token)


def test_offset_of_a_horizon_bound_schedule_moves_its_end() -> None:
    schedule = built(CASES["wsd linear"], offset=STAGE)
    assert schedule.rate(STAGE // 2) == PEAK
    assert schedule.rate(STAGE) == 3e-5


@given(entry=st.floats(0, PEAK))
def test_rewarming_starts_at_the_entry_rate(entry: float) -> None:
    schedule = built(CASES["rewarmed_cosine"])
    assert schedule.rate(0, entry_rate=entry) == entry
    assert schedule.rate(5_000, entry_rate=entry) == pytest.approx((entry + PEAK) / 2)
    assert schedule.rate(10_000, entry_rate=entry) == PEAK


@pytest.mark.parametrize("kind", ["anneal", "rewarmed_cosine"])
def test_kinds_that_continue_need_an_entry_rate(kind: str) -> None:
    with pytest.raises(ConfigError, match="an earlier stage stopped"):
        built({"kind": kind}).rate(0)


@pytest.mark.parametrize(("kind", "entry", "key"), [("anneal", 1e-5, "min_lr"), ("rewarmed_cosine", 4e-4, "peak_lr")])
def test_impossible_entry_rates_are_refused(kind: str, entry: float, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        built({"kind": kind}).rate(0, entry_rate=entry)


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ({"kind": "cosine", "min_lr": 1e-3}, r"schedule\.min_lr"),
        ({"kind": "infinite", "constant_lr": "5%", "min_lr": "10%"}, r"schedule\.constant_lr"),
        ({"kind": "infinite", "warmup": "50%", "cooldown": "10%"}, r"schedule\.cooldown"),
        ({"kind": "cosine", "warmup": "5000 steps"}, r"schedule\.warmup"),
        ({"kind": "wsd", "warmup": "50%", "decay": "60%"}, r"schedule\.warmup"),
        ({"kind": "anneal", "min_lr": 0}, "exponential"),
        ({"kind": "wsd", "decay_shape": "exponential", "min_lr": 0}, "exponential"),
        ({"kind": "wsd_s", "decay_shape": "reciprocal", "min_lr": 0}, "reciprocal"),
        ({"kind": "wsd_s", "releases": ["50%", "20%"]}, r"schedule\.releases: 20% is not behind"),
        ({"kind": "wsd_s", "releases": ["2M tokens"]}, r"schedule\.releases: 2M tokens is not .* within the stage"),
        ({"kind": "wsd_s", "warmup": "95%"}, r"schedule\.releases: .* before the warmup ends"),
        ({"kind": "wsd_s", "releases": ["50%", "60%"], "decay": "20%", "warmup": "50%"}, r"schedule\.releases"),
        ({"kind": "trilm", "second_lr": 4e-4}, r"schedule\.second_lr.*above"),
        ({"kind": "trilm", "second_lr": 1e-5, "min_lr": 3e-5}, r"schedule\.second_lr.*below"),
    ],
)
def test_impossible_schedules_name_their_key(case: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        built(case)


def test_a_saved_schedule_of_another_version_is_refused() -> None:
    saved = built(CASES["cosine"]).to_dict()
    with pytest.raises(CheckpointError, match="horizon"):
        schedule_from_dict({key: value for key, value in saved.items() if key != "horizon"})
    with pytest.raises(CheckpointError, match="did you mean 'cosine'"):
        schedule_from_dict({**saved, "kind": "cosinus"})
