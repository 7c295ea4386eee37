"""A run that was stopped, however it was, ends like one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megacpt.checkpoint.store import checkpoint_step, checkpoints
from megacpt.continuation.ledger import Ledger
from megacpt.optim.schedules import schedule_from_dict
from tests.pool import Pools
from tests.small import STEP, run_mapping
from tests.train.conftest import Session, ledger, metrics, weights

Streams = dict[str, str]
STEPS = 7


def _config(run: Path, streams: Streams, **changes: Any) -> dict[str, Any]:
    held_out = {"english": streams["english-valid"], "c": streams["c-valid"]}
    habits: dict[str, Any] = {"evaluate": {"every": "3 steps", "tokens": 200, "streams": held_out}}
    return run_mapping(run, {"english": streams["english"], "c": streams["c"]}, STEPS, **{**habits, **changes})


@pytest.fixture(scope="module")
def whole(session: Session, streams: Streams, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A session without interruption."""
    return session(_config(tmp_path_factory.mktemp("whole") / "run", streams))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("how", ["crash", "stop"])
def test_it_ends_with_the_same_weights(
    pools: Pools,
    session: Session,
    streams: Streams,
    whole: dict[str, Any],
    tmp_path: Path,
    how: str,
    asynchronous: bool,
) -> None:
    saving = {"every": "2 steps", "keep_last": None, "asynchronous": asynchronous}
    config = _config(tmp_path / "run", streams, checkpoint=saving)
    first = session(config, at=4, how=how)
    second = session(config, at=2, how=how)
    last = session(config)
    assert last["complete"]
    if how == "stop":
        assert first["checkpoint"].endswith("step-00000004")
        assert [len(s["rows"]) for s in (first, second, last)] == [4, 2, 1]
        assert not first["complete"]
    else:
        assert first["crashed"]
        assert second["crashed"]
    assert weights(pools, last["checkpoint"]) == weights(pools, whole["checkpoint"])
    assert ledger(last).id == ledger(whole).id
    assert ledger(last).stage.consumed == ledger(whole).stage.consumed


def test_a_complete_run_stays_as_it_is(session: Session, streams: Streams, tmp_path: Path) -> None:
    config = _config(tmp_path / "run", streams)
    first = session(config)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = session(config)
    assert again["complete"]
    assert again["rows"] == []
    assert (again["checkpoint"], again["ledger"]) == (first["checkpoint"], first["ledger"])
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_metrics_have_every_step_once(
    session: Session, streams: Streams, whole: dict[str, Any], tmp_path: Path
) -> None:
    config = _config(tmp_path / "run", streams)
    session(config, at=6, how="crash")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    session(config, at=2, how="crash")  # resumed at 4, so that 5 is written again
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "lo')  # and a line is cut off
    session(config)
    timeless = ("kind", "step", "tokens", "lineage_tokens", "loss", "rate", "grad_norm", "skipped")
    reference = Path(whole["checkpoint"]).parent.parent
    found = [[line[key] for key in timeless] for line in metrics(tmp_path / "run")]
    assert found == [[line[key] for key in timeless] for line in metrics(reference)]
    assert [line[1] for line in found] == [1, 2, 3, 4, 5, 6, 7]
    evaluations = metrics(tmp_path / "run", "eval")
    assert evaluations == metrics(reference, "eval")
    steps = [(line["step"], line["stream"]) for line in evaluations]
    assert steps == [(step, name) for step in (0, 3, 6, 7) for name in ("english", "c")]


def test_stopped_before_its_first_checkpoint_it_begins_again(
    pools: Pools, session: Session, streams: Streams, whole: dict[str, Any], tmp_path: Path
) -> None:
    config = _config(tmp_path / "run", streams)
    session(config, at=2, how="crash")
    assert checkpoints(tmp_path / "run") == []
    last = session(config)
    assert weights(pools, last["checkpoint"]) == weights(pools, whole["checkpoint"])
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in metrics(tmp_path / "run", "eval")][:4] == [0, 0, 3, 3]


def test_behind_a_damaged_checkpoint(
    pools: Pools, session: Session, streams: Streams, whole: dict[str, Any], tmp_path: Path
) -> None:
    config = _config(tmp_path / "run", streams)
    session(config, at=6, how="crash")
    newest = checkpoints(tmp_path / "run")[-1]
    assert checkpoint_step(newest) == 4
    tensors = next(newest.glob("*.distcp"))
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    last = session(config)
    assert len(last["rows"]) == STEPS - 2
    assert weights(pools, last["checkpoint"]) == weights(pools, whole["checkpoint"])


def test_a_stage_without_a_horizon_becomes_longer(
    pools: Pools, session: Session, streams: Streams, tmp_path: Path
) -> None:
    short, long = _config(tmp_path / "run", streams), _config(tmp_path / "long", streams)
    for config in (short, long):
        config["evaluate"] = {}
    session(short)
    for config in (short, long):
        config["stage"] = {**config["stage"], "tokens": 12 * STEP}
    grown = session(short)
    assert len(grown["rows"]) == 5
    assert weights(pools, grown["checkpoint"]) == weights(pools, session(long)["checkpoint"])
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 13))


def test_one_rank_that_is_asked_stops_all(session: Session, streams: Streams, tmp_path: Path) -> None:
    stopped = session(_config(tmp_path / "run", streams), ranks=2, at=3, how="stop last rank")
    assert not stopped["complete"]
    assert stopped["checkpoint"].endswith("step-00000003")
    assert not stopped["listening"]


def test_asked_in_the_last_step_it_is_complete(session: Session, streams: Streams, tmp_path: Path) -> None:
    assert session(_config(tmp_path / "run", streams), at=STEPS, how="stop")["complete"]


def test_the_rate_of_every_step_is_the_ledgers(whole: dict[str, Any]) -> None:
    lines = metrics(Path(whole["checkpoint"]).parent.parent)
    for line, path in zip(lines[1::2], checkpoints(Path(whole["checkpoint"]).parent.parent), strict=False):
        stage = Ledger.read(path).stage
        assert stage.tokens == line["tokens"]
        assert stage.rate == line["rate"]
    schedule = schedule_from_dict(ledger(whole).stage.schedule)
    assert [line["rate"] for line in lines] == [schedule.rate(n * STEP) for n in range(1, STEPS + 1)]
    assert [line["rate"] for line in lines[:2]] == [5e-3, 1e-2]  # two steps of warmup, the second at the peak
    assert lines[-1]["rate"] == 5.5e-3


def test_a_decay_ends_with_the_last_step(session: Session, streams: Streams, tmp_path: Path) -> None:
    """Also where the stage ends within a step."""
    config = _config(tmp_path / "run", streams, schedule={"kind": "linear", "warmup": "1 steps", "min_lr": "10%"})
    config["stage"] = {**config["stage"], "tokens": 4 * STEP - 50}
    session(config)
    rates = [line["rate"] for line in metrics(tmp_path / "run")]
    assert rates == pytest.approx([1e-2, 7e-3, 4e-3, 1e-3])
    assert rates[-1] == 1e-3


# Starting over, while nothing is lost by it.


def test_before_anything_was_saved_the_settings_may_change(
    pools: Pools, session: Session, streams: Streams, tmp_path: Path
) -> None:
    config, changed = (
        _config(tmp_path / name, streams, optim={"peak_lr": lr}) for name, lr in (("a", 1e-2), ("b", 2e-2))
    )
    session(config, at=2, how="crash")
    config["optim"] = changed["optim"]
    again, expected = session(config), session(changed)
    assert weights(pools, again["checkpoint"]) == weights(pools, expected["checkpoint"])
    assert [line["rate"] for line in metrics(tmp_path / "a")] == [line["rate"] for line in metrics(tmp_path / "b")]
    config["optim"] = {"peak_lr": 3e-2}
    kind, status, said = session(config)["error"]
    assert (kind, status) == ("ConfigError", 2)
    assert "holds a run with other settings" in said
    assert "optim.peak_lr: 0.02 -> 0.03" in said


def test_a_continued_run_without_a_checkpoint_keeps_its_parent(
    session: Session, streams: Streams, whole: dict[str, Any], tmp_path: Path
) -> None:
    config = _config(tmp_path / "run", streams)
    session(config, parent=whole["checkpoint"], at=1, how="crash")
    config["seed"] = 6
    assert "seed: 5 -> 6" in session(config)["error"][2]  # `train` does not know the parent
    assert session(config, parent=whole["checkpoint"], at=1, how="stop")["error"] is None


def test_a_stream_that_does_not_serve_leaves_no_run_folder(session: Session, streams: Streams, tmp_path: Path) -> None:
    config = _config(tmp_path / "run", streams, batch={"seq_length": 4096}, model={"max_seq_length": 4096})
    kind, _, said = session(config)["error"]
    assert (kind, "fewer than the 4,097 of one sample" in said) == ("DataError", True)
    assert not (tmp_path / "run").exists()
    config["batch"] = {**config["batch"], "seq_length": 16}
    assert session(config, at=1, how="stop")["error"] is None


def test_a_damaged_parent_can_be_changed_for_another(
    session: Session, streams: Streams, whole: dict[str, Any], tmp_path: Path
) -> None:
    import shutil

    run = shutil.copytree(Path(whole["checkpoint"]).parent.parent, tmp_path / "first")
    older, newest = checkpoints(Path(run))[-2:]
    tensors = next(newest.glob("*.distcp"))
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    config = _config(tmp_path / "run", streams)
    assert "take an earlier one of the run" in session(config, parent=str(newest))["error"][2]
    assert session(config, parent=str(older), at=1, how="stop")["error"] is None


def test_a_session_that_fails_tidies_up(session: Session, streams: Streams, tmp_path: Path) -> None:
    config = _config(tmp_path / "run", streams)
    found = session(config, at=3, how="crash")
    assert found["crashed"]
    assert not found["listening"]
