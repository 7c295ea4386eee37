"""Steps that go wrong change nothing, and too many of them end the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megacpt.checkpoint.store import checkpoint_step, checkpoints
from megacpt.train.callbacks.health import PATIENCE
from tests.pool import Pools
from tests.small import run_mapping
from tests.train.conftest import Session, metrics, weights

Streams = dict[str, str]


def _config(run: Path, streams: Streams, steps: int, **changes: Any) -> dict[str, Any]:
    return run_mapping(run, {"english": streams["english"]}, steps, **changes)


@pytest.mark.parametrize("changes", [{}, {"precision": "bfloat16"}], ids=["float32", "bfloat16"])
def test_a_gradient_that_is_none_changes_no_weight(
    pools: Pools, session: Session, streams: Streams, tmp_path: Path, changes: dict[str, Any]
) -> None:
    session(_config(tmp_path / "three", streams, 3, **changes))
    config = _config(tmp_path / "four", streams, 4, checkpoint={"every": "1 steps", "keep_last": None}, **changes)
    found = session(config, at=4, how="nan")
    assert found["complete"]
    last = metrics(tmp_path / "four")[-1]
    assert (last["step"], last["skipped"]) == (4, True)
    before, after = (
        pools(1).run("tests.checkpoint.cases:load", folder=str(path), **changes)[0]
        for path in checkpoints(tmp_path / "four")[-2:]
    )
    assert after == before


def test_a_few_bad_steps_are_survived(session: Session, streams: Streams, tmp_path: Path) -> None:
    config = _config(tmp_path / "run", streams, PATIENCE + 3)
    found = session(config, at=2, until=PATIENCE, how="nan")
    assert found["complete"]
    skipped = [line["step"] for line in metrics(tmp_path / "run") if line["skipped"]]
    assert skipped == list(range(2, PATIENCE + 1))


def test_too_many_in_a_row_end_the_run(pools: Pools, session: Session, streams: Streams, tmp_path: Path) -> None:
    config = _config(tmp_path / "run", streams, 2 * PATIENCE)
    found = session(config, at=4, until=99, how="nan")
    kind, status, text = found["error"]
    assert (kind, status) == ("TrainingError", 1)
    assert f"not finite in {PATIENCE} steps in a row (up to step {PATIENCE + 3}); none of them changed the" in text
    assert "Lower optim.peak_lr" in text
    assert metrics(tmp_path / "run")[-1]["step"] == PATIENCE + 3
    # What it saved on the way are the weights of the last good step.
    saved = checkpoints(tmp_path / "run")
    assert checkpoint_step(saved[-1]) == PATIENCE + 2
    three = session(_config(tmp_path / "three", streams, 3))
    assert weights(pools, saved[-1]) == weights(pools, three["checkpoint"])


def test_a_restart_does_not_forget_the_count(session: Session, streams: Streams, tmp_path: Path) -> None:
    config = _config(tmp_path / "run", streams, 3 * PATIENCE)
    first = session(config, at=3, until=99, how="nan")
    assert first["error"] is not None
    assert len(first["rows"]) == 12
    again = session(config, at=1, until=99, how="nan")  # from step 10, with eight bad ones counted
    assert again["error"] is not None
    assert len(again["rows"]) == 2
