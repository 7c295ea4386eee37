"""A rank that is killed leaves no process behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

from tests.pool import PRELOAD


def _save_and_wait(run: str) -> None:
    from megacpt.runtime.layout import start_process_group
    from tests.checkpoint import cases

    start_process_group()
    cases.save(run, [1], asynchronous=True)
    time.sleep(60)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_rank_leaves_no_process_behind(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_save_and_wait, args=(str(tmp_path),))
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "checkpoints" / "step-00000001").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    helpers = _children(process.pid or 0)
    assert helpers, "saving is done with a helper process"
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(20)
    while any(_alive(helper) for helper in helpers):
        assert time.monotonic() < deadline + 20
        time.sleep(0.05)
