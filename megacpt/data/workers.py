"""The processes that make parts: started fresh (spawn), stopped together, gone with the main process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from threading import Thread
from typing import Any

from megacpt.data.inputs import Shard
from megacpt.data.parts import Part, Recipe, make_part
from megacpt.data.tokenizer import Tokenizer, load_tokenizer
from megacpt.errors import DataError

_POLL_SECONDS = 0.2


def default_workers() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_parts(
    shards: Sequence[Shard],
    folder: Path,
    recipe: Recipe,
    tokenizer: Tokenizer,
    workers: int,
    advance: Callable[[int], None],
) -> None:
    """Make the parts of all `shards` in `folder`; `advance` gets the input bytes done.

    The first error stops all of them; parts that are finished stay.
    """
    workers = min(workers, len(shards))
    if workers <= 1:
        for shard in shards:
            make_part(shard, folder, recipe, tokenizer, advance)
        return
    context = get_context("spawn")
    done, stop = context.Value("q", 0), context.Value("b", 0, lock=False)
    with (
        _dead_worker_explained(),
        ProcessPoolExecutor(workers, context, _start, (folder, recipe, done, stop)) as pool,
    ):
        try:
            pending = {pool.submit(_make, shard) for shard in shards}
            reported = 0
            while pending:
                finished, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                advance(done.value - reported)
                reported = done.value
                for future in finished:
                    future.result()
        except BaseException:
            stop.value = 1
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _dead_worker_explained() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process ended unexpectedly, as when memory runs out: run the same command again with "
            "fewer --workers; finished parts are kept"
        ) from error


class _StoppedError(Exception):
    """Another worker failed, or the user interrupted."""


@dataclass(frozen=True)
class _Worker:
    folder: Path
    recipe: Recipe
    tokenizer: Tokenizer
    done: Any
    stop: Any

    def report(self, consumed: int) -> None:
        with self.done.get_lock():
            self.done.value += consumed
        if self.stop.value:
            raise _StoppedError


_worker: _Worker | None = None


def _start(folder: Path, recipe: Recipe, done: Any, stop: Any) -> None:
    global _worker
    # Ctrl-C reaches every process of the terminal; the main process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_leave_with_parent, daemon=True).start()
    _worker = _Worker(folder, recipe, load_tokenizer(recipe.tokenizer), done, stop)


def _leave_with_parent() -> None:
    """End this process when the main process is gone, so that no orphan writes beside its successor."""
    parent = parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _make(shard: Shard) -> Part:
    assert _worker is not None
    return make_part(shard, _worker.folder, _worker.recipe, _worker.tokenizer, _worker.report)
