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
