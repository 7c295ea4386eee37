"""Shares that change within a stage: by phases, and by a controller."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.continuation.boundary import annealed_config
from megacpt.continuation.ledger import Ledger
from megacpt.continuation.planning.shares import with_replay
from megacpt.data.plan import Phase, Segment, Source, StagePlan
from megacpt.data.stage_data import StageData
from tests.continuation.conftest import Finish, stage
from tests.continuation.planned import by_name, plan_of, shares
from tests.small import run_config

Streams = dict[str, str]


def _config(run: Path, mixture: dict[str, Any], phases: list[dict[str, Any]], **more: Any) -> Any:
    named = {"name": run.name, "tokens": 12_800, "mixture": mixture, "phases": phases}
    return run_config(run, mixture, **{"stage": {**named, **more.pop("stage", {})}, **more})


def _between(plan: StagePlan, first: int, last: int) -> dict[str, int]:
    """How many samples from `first` up to `last` come from each source."""
    data = StageData(plan)
    counts = zip(data.counts(first), data.counts(last), strict=True)
    return {s.name: after - before for s, (before, after) in zip(plan.sources, counts, strict=True)}


def test_phases_of_weights_and_replay(english: Path, streams: Streams, tmp_path: Path) -> None:
    mixture = {"python": {"path": streams["python"], "weight": 3}, "c": {"path": streams["c"], "weight": 0}}
    phases: list[dict[str, Any]] = [
        {"after": "25%", "weights": {"c": 1}},
        {"after": "50 steps", "replay": "20%"},
        {"after": "9600 tokens", "weights": {"python": 0}},
    ]
    plan = plan_of(_config(tmp_path / "run", mixture, phases), english)
    assert [phase.start for phase in plan.phases] == [200, 400, 600]
    assert _between(plan, 0, 200) == {"python": 200, "c": 0, "replay-english": 0}
    assert _between(plan, 200, 400) == {"python": 150, "c": 50, "replay-english": 0}
    assert _between(plan, 400, 600) == {"python": 120, "c": 40, "replay-english": 40}
    assert _between(plan, 600, 800) == {"python": 0, "c": 160, "replay-english": 40}


def test_a_ramp_over_the_stage(streams: Streams, tmp_path: Path) -> None:
    phases = [{"after": 0, "weights": {"english": 0, "c": 1}, "ramp": "100%"}]
    mixture = {"english": streams["english"], "c": {"path": streams["c"], "weight": 0}}
    plan = plan_of(_config(tmp_path / "run", mixture, phases))
    assert plan.phases == (Phase(0, (0.0, 1.0), 800),)
    data = StageData(plan)
    for g in range(0, 801, 50):
        # Of the first g samples of a line from 0 to 1, g^2 / (2 * 800) are of the rising stream.
        assert abs(data.counts(g)[1] - Fraction(g * g, 1600)) <= 2
    assert data.counts(800) == (400, 400)


def test_an_epoch_counts_what_the_phases_take(streams: Streams, tmp_path: Path) -> None:
    mixture = {"english": {"path": streams["english"], "epochs": 2}, "c": {"path": streams["c"], "weight": 0}}
    phases = [{"after": "10%", "weights": {"english": 1, "c": 3}}]
    plan = plan_of(_config(tmp_path / "run", mixture, phases))
    taken = StageData(plan).counts(800)[0]
    assert taken == 80 + 180
    subset = plan.sources[0].segments[0].subset
    assert subset is not None
    assert subset.windows == taken // 2


def test_a_stream_without_weight_is_not_opened(streams: Streams, tmp_path: Path) -> None:
    mixture = {"english": streams["english"], "none": {"path": "missing", "weight": 0}}
    phases = [{"after": "10%", "weights": {"english": 2}}]
    assert [s.name for s in plan_of(_config(tmp_path / "run", mixture, phases)).sources] == ["english"]


def _plan(weights: list[float], old: int, phases: tuple[Phase, ...] = ()) -> StagePlan:
    new = len(weights) - old
    sources = tuple(
        Source(str(i), "x", str(i), "new" if i < new else "replay", None if i < new else "fresh", w, (_OPEN,))
        for i, w in enumerate(weights)
    )
    return StagePlan(16, 1, sources, phases)


_OPEN = Segment(1, 16, 0, None)


def test_a_change_of_replay() -> None:
    plan = _plan([0.5, 0.25, 0.25, 0.0], 2, (Phase(100, (0.25, 0.5, 0.25, 0.0)),))
    first = with_replay(plan, 40, 0.4, [3, 1])
    assert first.phases == (
        Phase(40, (pytest.approx(0.4), pytest.approx(0.2), pytest.approx(0.3), pytest.approx(0.1))),  # type: ignore[arg-type]
        Phase(100, (pytest.approx(0.2), pytest.approx(0.4), pytest.approx(0.3), pytest.approx(0.1))),  # type: ignore[arg-type]
    )
    second = with_replay(first, 100, 0.0, [3, 1])
    assert [phase.start for phase in second.phases] == [40, 100]
    assert second.phases[1].shares == pytest.approx((1 / 3, 2 / 3, 0, 0))
    third = with_replay(second, 300, 0.1, [3, 1])
    assert third.phases[:2] == second.phases
    assert third.phases[2].shares == pytest.approx((0.3, 0.6, 0.075, 0.025))
    assert {source.weight for source in third.sources} == {source.weight for source in plan.sources}


def test_a_change_on_a_ramp_goes_on_to_its_end(streams: Streams, tmp_path: Path) -> None:
    phases = [{"after": "25%", "weights": {"python": 0, "c": 1}, "ramp": "50%"}]
    mixture = {"python": streams["python"], "c": {"path": streams["c"], "weight": 0}}
    replay = {"share": "0%", "policy": "external", "streams": {"web": streams["english"]}}
    config = _config(
        tmp_path / "run",
        mixture,
        phases,
        stage={"replay": replay, "controller": {}},
        evaluate={"streams": {"web": streams["english-valid"]}},
    )
    plan = plan_of(config)
    assert plan.phases == (Phase(200, (0.0, 1.0, 0.0), 400),)
    changed = with_replay(plan, 400, 0.2, [1.0])
    assert changed.phases == (plan.phases[0], Phase(400, (0.0, 0.8, 0.2), 200))
    assert _between(changed, 0, 400) == _between(plan, 0, 400)
    ramp = _between(changed, 400, 600)  # from (50%, 50%, 0) to (0, 80%, 20%)
    assert ramp == {
        "python": pytest.approx(50, abs=2),
        "c": pytest.approx(130, abs=2),
        "replay-web": pytest.approx(20, abs=2),
    }
    assert _between(changed, 600, 800) == {"python": 0, "c": 160, "replay-web": 40}


@given(
    st.lists(st.floats(0.01, 10), min_size=2, max_size=4),
    st.lists(st.floats(0.01, 10), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(1, 400), st.floats(0, 0.99)), min_size=1, max_size=8, unique_by=lambda c: c[0]),
)
def test_changes_of_replay_keep_the_proportions(
    new: list[float], old: list[float], changes: list[tuple[int, float]]
) -> None:
    plan = _plan([w / sum(new) for w in new] + [0.0] * len(old), len(old), (Phase(200, (*new, *(0.0 for _ in old))),))
    for start, share in sorted(changes):
        before = plan
        plan = with_replay(plan, start, share, old)
        assert [phase for phase in plan.phases if phase.start < start] == [
            phase for phase in before.phases if phase.start < start
        ]
        for phase in plan.phases:
            if phase.start >= start:
                fresh, replayed = phase.shares[: len(new)], phase.shares[len(new) :]
                assert sum(phase.shares) == pytest.approx(1)
                assert sum(replayed) == pytest.approx(share)
                assert [w * sum(new) for w in fresh] == pytest.approx([w * sum(fresh) for w in new])
                assert [w * sum(old) for w in replayed] == pytest.approx([w * share for w in old])


@pytest.mark.parametrize(("steps", "expected"), [(10, (0.75, 0.25)), (60, (0.3, 0.5)), (100, (0.0, 0.8))])
def test_a_branch_keeps_the_mixture_that_it_leaves(
    english: Path, streams: Streams, tmp_path: Path, finish: Finish, steps: int, expected: tuple[float, float]
) -> None:
    mixture = {"python": {"path": streams["python"], "weight": 3, "epochs": 8}, "c": streams["c"]}
    phases = [
        {"after": "20%", "weights": {"python": 3, "c": 5}, "replay": "20%"},
        {"after": "80%", "weights": {"python": 0}, "ramp": "10%"},
    ]
    trunk = finish(_config(tmp_path / "trunk", mixture, phases), english, steps)
    config, parent = annealed_config(trunk, "10 steps", tmp_path / "branch", [])
    assert config.stage.phases == []
    plan, before = plan_of(config, parent), Ledger.read(trunk).stage.plan
    assert not plan.phases
    found = shares(plan, 10_000)
    assert (found.get("python", 0.0), found["c"]) == expected
    if "python" in found:
        left, goes_on = by_name(before)["python"].segments[0], by_name(plan)["python"].segments[0]
        assert goes_on.subset == left.subset
        assert goes_on.start == StageData(before).counts(8 * steps)[0]


def test_a_branch_keeps_the_share_that_a_controller_came_to(
    english: Path, streams: Streams, tmp_path: Path, finish: Finish
) -> None:
    config = stage(
        tmp_path / "trunk",
        {"python": streams["python"]},
        stage={
            "name": "trunk",
            "tokens": 1024,
            "mixture": {"python": streams["python"]},
            "replay": {"share": "5%"},
            "controller": {},
        },
        evaluate={"streams": {"english": streams["english-valid"]}},
    )
    trunk = finish(config, english)
    ledger = Ledger.read(trunk).with_stage(controller={"share": 0.07})
    (trunk / "ledger.json").write_text(ledger.to_json())
    branch, _ = annealed_config(trunk, "10 steps", tmp_path / "branch", [])
    assert branch.stage.replay.share == 0.07
    assert branch.stage.controller is None
