"""A controller in training: it moves the share of replay, exactly under kills, resumes and other layouts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from megacpt.data.stage_data import StageData
from tests.pool import Pools
from tests.small import STEP, run_mapping
from tests.train.conftest import Session, ledger, metrics, weights

STEPS = 10


@pytest.fixture(scope="module")
def parent(session: Session, streams: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that was trained on english."""
    run = tmp_path_factory.mktemp("english") / "run"
    result = session(run_mapping(run, {"english": streams["english"]}, steps=100, checkpoint={"every": "100 steps"}))
    return str(result["checkpoint"])


def _config(run: Path, streams: dict[str, str], **changes: Any) -> dict[str, Any]:
    """A stage on python whose replay of english begins at 0 and moves by 20% after every second step."""
    stage = {
        "name": "python",
        "tokens": STEPS * STEP,
        "mixture": {"python": streams["python"]},
        "replay": {"share": "0%", "policy": "seen"},
        "controller": {"target": 0.001, "step": "20%", "max": "50%", **changes.pop("controller", {})},
    }
    held_out = {"english": streams["english-valid"], "python": streams["python-valid"]}
    evaluate = {"every": "2 steps", "dense": None, "streams": held_out}
    more = {"stage": stage, "evaluate": evaluate, "schedule": {"kind": "constant", "warmup": 0}, **changes}
    return run_mapping(run, {}, **more)


@pytest.fixture(scope="module")
def whole(
    session: Session, streams: dict[str, str], parent: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The stage, from its start to its end."""
    return session(_config(tmp_path_factory.mktemp("whole") / "run", streams), parent=parent)


def test_the_share_follows_what_is_forgotten(whole: dict[str, Any]) -> None:
    found = ledger(whole)
    stage, run = found.stage, Path(whole["checkpoint"]).parents[1]
    assert stage.controller is not None
    losses = {line["step"]: line["bits_per_byte"] for line in metrics(run, "eval") if line["stream"] == "english"}
    assert stage.controller["reference"] == {"english": round(losses[0], 3)}
    share, expected = 0.0, []
    for step in (2, 4, 6, 8):  # the evaluation at the end decides nothing
        rise = round(round(losses[step], 3) - round(losses[0], 3), 3)
        share = min(0.5, round(share + 0.2, 9)) if rise > 0.001 else max(0.0, share - (0.2 if rise < 0.0005 else 0.0))
        expected.append({"step": step, "rise": rise, "share": share})
    assert stage.controller["decisions"] == expected
    shares = [decision["share"] for decision in expected]
    assert shares[:3] == [0.2, 0.4, 0.5]  # english is forgotten: nothing of it is replayed at first
    changed = [d for d, before in zip(expected, [0.0, *shares], strict=False) if d["share"] != before]
    assert [(p.start, round(p.shares[1], 9)) for p in stage.plan.phases] == [
        (8 * d["step"], d["share"]) for d in changed
    ]
    assert [line["share"] for line in metrics(run, "controller")] == shares


def test_the_samples_are_those_of_the_ledger(whole: dict[str, Any]) -> None:
    """The plan in the ledger tells what was read, whatever the controller did while it was."""
    stage = ledger(whole).stage
    data = StageData(stage.plan)
    counts = data.counts(8 * STEPS)
    assert stage.consumed == {s.name: 16 * n for s, n in zip(stage.plan.sources, counts, strict=True)}
    assert counts[1] > 0
    expected = [
        [hashlib.sha256(data.tokens(8 * step + k).tobytes()).hexdigest() for k in range(8)] for step in range(STEPS)
    ]
    assert whole["rows"] == expected


@pytest.mark.parametrize(("at", "how"), [(4, "crash"), (5, "stop"), (6, "stop"), (9, "crash")])
def test_a_run_that_was_interrupted_ends_the_same(
    session: Session,
    pools: Pools,
    streams: dict[str, str],
    parent: str,
    whole: dict[str, Any],
    tmp_path: Path,
    at: int,
    how: str,
) -> None:
    config = _config(tmp_path / "run", streams)
    session(config, parent=parent, at=at, how=how)
    result = session(config)
    assert result["complete"]
    assert ledger(result).id == ledger(whole).id
    assert weights(pools, result["checkpoint"]) == weights(pools, whole["checkpoint"])
    runs = [Path(end["checkpoint"]).parents[1] for end in (result, whole)]
    decided = [[{**line, "seconds": 0} for line in metrics(run, "controller")] for run in runs]
    assert decided[0] == decided[1]


def test_another_layout_decides_the_same(
    session: Session, streams: dict[str, str], parent: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    """One interruption, and two ranks in the place of one."""
    config = _config(tmp_path / "run", streams)
    session(config, parent=parent, at=5, how="stop")
    result = session(config, ranks=2)
    assert ledger(result).stage.plan == ledger(whole).stage.plan
    assert ledger(result).stage.controller == ledger(whole).stage.controller
    assert result["rows"] == whole["rows"][5:]


def test_what_the_controller_measures_is_part_of_the_run(
    session: Session, streams: dict[str, str], parent: str, tmp_path: Path
) -> None:
    config = _config(tmp_path / "run", streams)
    session(config, parent=parent, at=3, how="stop")
    config["evaluate"]["every"] = "3 steps"
    name, status, message = session(config)["error"]
    assert (name, status) == ("ConfigError", 2)
    assert "evaluate.every: 2 steps -> 3 steps" in message


def test_nothing_to_replay(session: Session, streams: dict[str, str], tmp_path: Path) -> None:
    name, status, message = session(_config(tmp_path / "run", streams))["error"]
    assert (name, status) == ("ConfigError", 2)
    assert "stage.controller sets the share of replay, but there is nothing to replay: this is the first" in message
