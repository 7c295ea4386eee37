"""The demo, killed at ten moments and started again by the same call, ends with bitwise the same weights."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pool import PRELOAD

TOKENS = 120_000
KILLS = 10


def _demo(out: str) -> None:
    """One session of the demo, in a process of its own."""
    os.environ["MEGACPT_DEVICE"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = "1"
    from rich.console import Console

    from megacpt.demo import run

    run.THREADS = 1
    with Path(os.devnull).open("w") as nowhere:
        run.demo(Path(out), tokens=TOKENS, console=Console(file=nowhere))


def _texts(out: str) -> None:
    """What the demo does before it trains."""
    from megacpt.demo.run import prepare_streams

    prepare_streams(Path(out))


def _start(out: Path, target: Callable[[str], None] = _demo) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=target, args=(str(out),))
    process.start()
    return process


def _wait_for_a_checkpoint_being_written(out: Path, process: multiprocessing.process.BaseProcess) -> bool:
    """Return whether one is being written now; False if the process ended before."""
    while process.is_alive():
        if any(out.glob("runs/*/checkpoints/.step-*.partial")):
            return True
        time.sleep(0.001)
    return False


def _files(out: Path) -> dict[str, dict[str, str]]:
    """The hashes of the tensors in the newest checkpoint of every run."""
    found = {}
    for run in sorted((out / "runs").iterdir()):
        newest = max((run / "checkpoints").glob("step-*"))
        files = json.loads((newest / "manifest.json").read_text())["files"]
        found[f"{run.name}/{newest.name}"] = {n: d["sha256"] for n, d in files.items() if n.endswith(".distcp")}
    return found


@pytest.mark.timeout(1500)
def test_a_killed_demo_ends_like_one_that_was_not(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    _start(out, _texts).join(240)
    begun = time.perf_counter()
    whole = _start(out)
    whole.join(600)
    assert whole.exitcode == 0
    seconds = time.perf_counter() - begun
    expected = _files(out)
    assert len(expected) == 5
    assert all(expected.values())
    metrics = {run.name: (run / "metrics.jsonl").read_text().count("\n") for run in (out / "runs").iterdir()}
    shutil.move(out / "runs", tmp_path / "reference")

    moments = random.Random(7)
    during_a_save = 0
    for kill in range(KILLS):
        process = _start(out)
        if kill % 2:
            during_a_save += _wait_for_a_checkpoint_being_written(out, process)
        else:
            time.sleep(moments.uniform(0.03, 0.1) * seconds)  # together less than the demo takes
        assert process.is_alive(), f"the demo was over before kill {kill}: make it longer"
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(20)
    assert during_a_save == KILLS // 2

    last = _start(out)
    last.join(600)
    assert last.exitcode == 0
    assert _files(out) == expected
    assert metrics == {run.name: (run / "metrics.jsonl").read_text().count("\n") for run in (out / "runs").iterdir()}
