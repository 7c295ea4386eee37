"""What the writers of a save report reaches that save, whatever its size, and no process stays behind."""

from __future__ import annotations

import multiprocessing
import os
import queue
from pathlib import Path

import pytest

from megacpt.checkpoint.reports import Report
from tests.pool import Pools

LARGE = {0: ["x" * 1000] * 1000}  # more than a pipe holds


def _write(report: Report, whole: bool) -> None:
    report.put(LARGE)
    if not whole:
        report.file.truncate(1000)
        os._exit(1)


@pytest.mark.parametrize("whole", [True, False])
def test_a_fork_reports(whole: bool) -> None:
    report, other = Report(), Report()
    writer = multiprocessing.get_context("fork").Process(target=_write, args=(report, whole))
    writer.start()
    writer.join(20)
    for asked in [report, other] if not whole else [other]:
        with pytest.raises(queue.Empty):
            asked.get_nowait()
    assert not whole or report.get_nowait() == LARGE


def _children(pid: int) -> set[str]:
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def test_saving_leaves_no_process(pools: Pools, tmp_path: Path) -> None:
    pool = pools(1)
    before = _children(pool.ranks[0].pid or 0)
    pool.run("tests.checkpoint.cases:save", run=str(tmp_path), steps=[1, 2], asynchronous=True)
    assert _children(pool.ranks[0].pid or 0) <= before
