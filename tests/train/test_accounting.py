"""Whatever the restarts and layouts: the same samples, the same tokens of each stream, replay of what was seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megacpt.continuation.ledger import Ledger
from megacpt.data.stage_data import StageData
from tests.small import run_mapping
from tests.train.conftest import Session, ledger, metrics

Streams = dict[str, str]
STEPS = 8


def _second(run: Path, streams: Streams, **changes: Any) -> dict[str, Any]:
    config = run_mapping(run, {"python": streams["python"]}, STEPS, **changes)
    config["stage"] = {**config["stage"], "name": "second", "replay": {"share": "25%", "policy": "seen"}}
    return config


@pytest.fixture(scope="module")
def first(session: Session, streams: Streams, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A first stage on two streams."""
    mixture = {"english": {"path": streams["english"], "weight": 3}, "c": streams["c"]}
    return session(run_mapping(tmp_path_factory.mktemp("first") / "run", mixture, 4))


@pytest.fixture(scope="module")
def whole(
    session: Session, first: dict[str, Any], streams: Streams, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A second stage with replay, without interruption."""
    return session(_second(tmp_path_factory.mktemp("whole") / "run", streams), parent=first["checkpoint"])


@pytest.fixture(scope="module")
def moved(
    session: Session, first: dict[str, Any], streams: Streams, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The same stage in four sessions: alone, on two data-parallel ranks, on two tensor-parallel ones, alone."""
    run = tmp_path_factory.mktemp("moved") / "run"
    arguments = {"parent": first["checkpoint"]}
    return [
        session(_second(run, streams), at=4, how="crash", **arguments),
        session(_second(run, streams, batch={"microbatch": 4}), ranks=2, at=2, how="stop", **arguments),
        session(_second(run, streams, parallel={"tensor": 2, "sequence": True}), ranks=2, at=3, how="crash"),
        session(_second(run, streams, batch={"microbatch": 1}), **arguments),
    ]


def test_every_step_has_the_same_samples(whole: dict[str, Any], moved: list[dict[str, Any]]) -> None:
    # Checkpoints are at even steps, and where a session was asked to stop.
    assert [len(result["rows"]) for result in moved] == [3, 2, 2, 2]
    assert moved[0]["rows"] == whole["rows"][:3]
    assert moved[1]["rows"] == whole["rows"][2:4]
    assert moved[2]["rows"] == whole["rows"][4:6]
    assert moved[3]["rows"] == whole["rows"][6:8]
    assert all(len(set(step)) == len(step) == 8 for step in whole["rows"])


def test_the_ledger_is_the_same(whole: dict[str, Any], moved: list[dict[str, Any]]) -> None:
    one, other = ledger(whole), ledger(moved[-1])
    assert other.id == one.id
    assert other.stage.consumed == one.stage.consumed == {
        "python": 48 * 16,
        "replay-english": 12 * 16,
        "replay-c": 4 * 16,
    }  # fmt: skip
    assert other.stage.repeats == one.stage.repeats
    assert one.stage.layouts == ("tp1 pp1 cp1 dp1",)
    assert other.stage.layouts == ("tp1 pp1 cp1 dp1", "tp1 pp1 cp1 dp2", "tp2 pp1 cp1 dp1 sp", "tp1 pp1 cp1 dp1")


def test_the_losses_are_the_same(whole: dict[str, Any], moved: list[dict[str, Any]]) -> None:
    one, other = (metrics(Path(result["checkpoint"]).parent.parent) for result in (whole, moved[-1]))
    assert [line["step"] for line in other] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [line["lineage_tokens"] for line in other] == [line["lineage_tokens"] for line in one]


def test_replay_yields_only_what_was_trained_on(first: dict[str, Any], whole: dict[str, Any]) -> None:
    seen = {row for step in first["rows"] for row in step}
    plan = ledger(whole).stage.plan
    data = StageData(plan)
    replayed = 0
    for number, row in enumerate(row for step in whole["rows"] for row in step):
        if plan.sources[data.locate(number).source].role == "replay":
            assert row in seen
            replayed += 1
        else:
            assert row not in seen
    assert replayed == 16


def test_the_hashes_of_samples_tell_where_they_are_from(first: dict[str, Any], whole: dict[str, Any]) -> None:
    """`sample_hash` names a window of a stream, the same one in whichever stage it is read."""
    before, now = StageData(ledger(first).stage.plan), StageData(ledger(whole).stage.plan)
    consumed = {before.sample_hash(g) for g in range(4 * 8)}
    sources = [source.role for source in now.plan.sources]
    for g in range(STEPS * 8):
        replay = sources[now.locate(g).source] == "replay"
        assert (now.sample_hash(g) in consumed) == replay


def test_repeats_count_readings_of_what_there_is(whole: dict[str, Any]) -> None:
    """Of a new stream its windows; of seen replay what had been consumed: 24 samples of english, 8 of c."""
    stage = ledger(whole).stage
    python = StageData(stage.plan).streams[0].tokens
    assert stage.repeats == pytest.approx(
        {"python": 48 / ((python - 1) // 16), "replay-english": 12 / 24, "replay-c": 4 / 8}
    )


def test_a_third_stage_replays_both(
    session: Session, whole: dict[str, Any], first: dict[str, Any], streams: Streams, tmp_path: Path
) -> None:
    config = run_mapping(tmp_path / "third", {"new": streams["python-valid"]}, 4)
    config["stage"] = {**config["stage"], "name": "third", "replay": {"share": "50%", "policy": "seen"}}
    third = session(config, parent=whole["checkpoint"])
    assert ledger(third).parent == Ledger.read(Path(whole["checkpoint"])).id
    consumed = ledger(third).stage.consumed
    # 36 samples of english, 12 of c and 48 of python were consumed; those that were replayed count again.
    shares = {"new": 16.0, "replay-english": 6.0, "replay-c": 2.0, "replay-python": 8.0}
    assert consumed == {name: pytest.approx(share * 16, abs=16) for name, share in shares.items()}
    assert sum(consumed.values()) == 4 * 128
    seen = {row for result in (first, whole) for step in result["rows"] for row in step}
    rows = [row for step in third["rows"] for row in step]
    data = StageData(ledger(third).stage.plan)
    assert all((row in seen) == (data.locate(number).source > 0) for number, row in enumerate(rows))
