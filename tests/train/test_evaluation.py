"""Evaluation during training: no trace in the weights, and the choice of the best checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megacpt.checkpoint.store import checkpoint_step, checkpoints
from tests.pool import Pools
from tests.small import run_mapping
from tests.train.conftest import Session, ledger, metrics

Streams = dict[str, str]


def _config(run: Path, streams: Streams, **changes: Any) -> dict[str, Any]:
    return run_mapping(run, {"english": streams["english"]}, 4, **changes)


def _held_out(streams: Streams, every: str = "1 steps") -> dict[str, Any]:
    return {"every": every, "streams": {"english": streams["english-valid"], "c": streams["c-valid"]}}


@pytest.mark.parametrize("changes", [{}, {"precision": "bfloat16"}, {"recompute": "full"}], ids=str)
def test_it_leaves_no_trace_in_the_weights(
    pools: Pools, session: Session, streams: Streams, tmp_path: Path, changes: dict[str, Any]
) -> None:
    watched = session(_config(tmp_path / "watched", streams, evaluate=_held_out(streams), **changes))
    plain = session(_config(tmp_path / "plain", streams, **changes))
    read = {"precision": changes["precision"]} if "precision" in changes else {}
    one, other = (
        pools(1).run("tests.checkpoint.cases:load", folder=found["checkpoint"], **read) for found in (watched, plain)
    )
    assert one == other
    assert ledger(watched).id == ledger(plain).id
    assert metrics(tmp_path / "plain", "eval") == []
    assert len(metrics(tmp_path / "watched", "eval")) == 2 * 5


def _steps(run: Path) -> list[int]:
    return [line["step"] for line in metrics(run, "eval")]


def test_a_boundary_is_watched_closely(session: Session, streams: Streams, tmp_path: Path) -> None:
    """After steps 1, 2, 4 and 8 of a stage that continues another, though it is killed between them."""
    settings = {"evaluate": {"every": "10 steps", "dense": "9 steps", "streams": {"c": streams["c-valid"]}}}
    mixture = {"english": streams["english"]}
    first = session(run_mapping(tmp_path / "first", mixture, 4, **settings))
    assert _steps(tmp_path / "first") == [0, 4]
    second = run_mapping(tmp_path / "second", mixture, 12, **settings, stage={"name": "second"})
    session(second, parent=first["checkpoint"], at=6, how="crash")
    session(second, parent=first["checkpoint"])
    assert _steps(tmp_path / "second") == [0, 1, 2, 4, 8, 10, 12]
    settings["evaluate"]["dense"] = None  # type: ignore[assignment]
    third = run_mapping(tmp_path / "third", mixture, 12, **settings, stage={"name": "third"})
    watched = session(third, parent=first["checkpoint"])
    assert _steps(tmp_path / "third") == [0, 10, 12]
    assert watched["complete"]


def test_the_length_of_evaluation_is_its_own(session: Session, streams: Streams, tmp_path: Path) -> None:
    """Stages of other sequence lengths measure the same where they are told to."""
    found = []
    for length, own in ((16, None), (32, None), (32, 16)):
        name = f"{length}-{own}"
        held_out = {"seq_length": own, "streams": {"c": streams["c-valid"]}}
        session(_config(tmp_path / name, streams, evaluate=held_out, batch={"seq_length": length, "sequences": 4}))
        found.append(metrics(tmp_path / name, "eval")[0]["loss"])
    assert found[0] == found[2] != found[1]


def test_the_best_checkpoints_are_kept(session: Session, streams: Streams, tmp_path: Path) -> None:
    """Training on english first helps on c and then spoils it, so that the best is neither the first nor the last."""
    config = run_mapping(
        tmp_path / "run",
        {"english": streams["english"]},
        12,
        checkpoint={"every": "1 steps", "keep_last": 1, "keep_best": 1},
        evaluate={"every": "1 steps", "streams": {"c": streams["c-valid"]}},
        optim={"peak_lr": 0.03, "clip": None},
    )
    session(config, at=8, how="stop")  # what is best is remembered over a resume
    session(config)
    losses = {line["step"]: line["loss"] for line in metrics(tmp_path / "run", "eval") if line["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert 1 < best < 8
    assert [checkpoint_step(path) for path in checkpoints(tmp_path / "run")] == [best, 12]


def test_a_held_out_stream_of_another_tokenizer_is_refused(session: Session, streams: Streams, tmp_path: Path) -> None:
    from megacpt.data.prepare import prepare
    from megacpt.data.train_tokenizer import train_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789\n" * 50)
    train_tokenizer([text], 300, tmp_path / "pieces")
    prepare([text], tmp_path / "pieces", tmp_path / "other", workers=1, progress=False)
    config = _config(tmp_path / "run", streams, evaluate={"streams": {"other": str(tmp_path / "other")}})
    kind, status, said = session(config)["error"]
    assert (kind, status) == ("DataError", 2)
    assert f"the stream {tmp_path / 'other'} was made with tokenizer {tmp_path / 'pieces'}" in said
    assert "the model uses bytes" in said
