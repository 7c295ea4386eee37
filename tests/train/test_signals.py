"""The command line, asked to stop: it saves, ends with status 75, and the same command goes on to the same weights."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from megacpt.checkpoint.store import checkpoint_step, checkpoints
from megacpt.continuation.ledger import Ledger
from tests.cli.command import finish, launch, megacpt
from tests.pool import Pools
from tests.small import run_mapping
from tests.train.conftest import metrics, weights

STEPS = 150


def _run_file(folder: Path, streams: dict[str, str], run: str) -> str:
    config = run_mapping(run, {"english": streams["english"]}, STEPS, checkpoint={"every": "1000 steps"})
    (folder / f"{run}.yaml").write_text(yaml.safe_dump(config))
    return f"{run}.yaml"


@pytest.fixture(scope="module")
def whole(streams: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert megacpt("train", _run_file(folder, streams, "whole"), folder=folder).status == 0
    return folder / "whole" / "checkpoints" / f"step-{STEPS:08d}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_goes_on_later(
    pools: Pools, streams: dict[str, str], whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    file = _run_file(tmp_path, streams, "stopped")
    process = launch("train", file, folder=tmp_path)
    log = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert process.is_alive(), (tmp_path / ".err").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid or 0, number)
    stopped = finish(process, tmp_path)
    assert stopped.status == 75
    assert "stopped early; the same command goes on: stopped/checkpoints/step-" in stopped.err
    assert "Traceback" not in stopped.err
    (saved,) = checkpoints(tmp_path / "stopped")
    step = checkpoint_step(saved)
    assert 3 <= step < STEPS, "it was too quick to be stopped"
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == list(range(1, step + 1))

    again = megacpt("train", file, folder=tmp_path)
    assert again.status == 0
    assert f"resumed at step {step}" in again.err
    assert "complete: stopped/checkpoints/step-00000150" in again.err
    last = tmp_path / "stopped" / "checkpoints" / f"step-{STEPS:08d}"
    assert weights(pools, last) == weights(pools, whole)
    assert Ledger.read(last).id == Ledger.read(whole).id
