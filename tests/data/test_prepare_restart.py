"""Real processes that are killed, or run into a limit, and are started again with the same command."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megacpt.data.prepare import prepare
from megacpt.data.stream import StreamMeta, TokenStream
from megacpt.data.tokenizer import load_tokenizer
from tests.data.conftest import write_jsonl

TEXTS = [f"document {i}: " + "word " * (i % 90) for i in range(12_000)]
PROGRAM = """
import resource, sys, time
from megacpt.data import workers
from megacpt.data.indexed import IndexedWriter
from megacpt.data.prepare import prepare
from megacpt.errors import MegacptError

def slowly(function):
    def paced(*arguments):
        time.sleep(0.02)
        return function(*arguments)
    return paced

# A pace at which a loaded machine can still stop the program in the middle.
workers.make_part = slowly(workers.make_part)
IndexedWriter.extend = slowly(IndexedWriter.extend)

if __name__ == "__main__":
    source, out, workers, limit = sys.argv[1:]
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        prepare(
            [source], "bytes", out, workers=int(workers), holdout=0.05, progress=False, shard_bytes=150_000
        )
    except MegacptError as error:
        sys.exit(f"error: {error}")
"""


class Restarts:
    """Starts the same preparation again and again, each time as a new process."""

    def __init__(self, folder: Path) -> None:
        self.source, self.out = folder / "source.jsonl", folder / "out"
        self.program = folder / "program.py"
        self.program.write_text(PROGRAM)
        write_jsonl(self.source, TEXTS)

    def start(self, workers: int = 1, limit: int = 0) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            str(self.program),
            str(self.source),
            str(self.out),
            str(workers),
            str(limit),
        ]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def kill_when(self, ready: Callable[[], bool], workers: int = 1) -> bool:
        """Start, wait for `ready`, then SIGKILL the main process; tell whether it was still running."""
        process = self.start(workers)
        while process.poll() is None and not ready():
            time.sleep(0.0005)
        killed = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return killed

    def parts(self) -> int:
        folder = self.out.with_name("out.partial") / "parts"
        return len(list(folder.glob("*.json"))) if folder.is_dir() else 0

    def finish(self, workers: int = 1) -> None:
        process = self.start(workers)
        _, message = process.communicate(timeout=60)
        assert process.returncode == 0, message

    def check(self, expected: Path) -> None:
        for suffix in ("", "-valid"):
            made = TokenStream.open(self.out.with_name(f"out{suffix}"), verify="full").meta
            assert made.content_hash == StreamMeta.read(expected.with_name(f"{expected.name}{suffix}")).content_hash
        assert not self.out.with_name("out.partial").exists()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The streams of an undisturbed preparation in one piece."""
    folder = tmp_path_factory.mktemp("expected")
    write_jsonl(folder / "source.jsonl", TEXTS)
    prepare([folder / "source.jsonl"], "bytes", folder / "out", workers=1, holdout=0.05, progress=False)
    tokenizer = load_tokenizer("bytes")
    streams = [TokenStream.open(folder / name) for name in ("out", "out-valid")]
    found = [tokenizer.decode(stream.document(i)) for stream in streams for i in range(stream.documents)]
    assert sorted(found) == sorted(TEXTS)
    return folder / "out"


def test_killed_again_and_again_while_tokenising(tmp_path: Path, expected: Path) -> None:
    restarts = Restarts(tmp_path)
    for parts in (1, 4, 7, 12):
        assert restarts.kill_when(lambda parts=parts: restarts.parts() >= parts)
        assert parts <= restarts.parts() < 20
        assert not restarts.out.exists()
    restarts.finish()
    restarts.check(expected)


@pytest.mark.parametrize("place", ["valid", "train", "out-valid"])
def test_killed_while_merging(tmp_path: Path, expected: Path, place: str) -> None:
    restarts = Restarts(tmp_path)
    folder = tmp_path / "out-valid" if place == "out-valid" else tmp_path / "out.partial" / place
    assert restarts.kill_when(folder.exists)
    assert not restarts.out.exists()
    assert restarts.out.with_name("out.partial").is_dir()
    restarts.finish()
    restarts.check(expected)


def test_killed_with_workers_leaves_no_orphan_and_goes_on_with_another_number(tmp_path: Path, expected: Path) -> None:
    restarts = Restarts(tmp_path)
    process = restarts.start(workers=2)
    wait_until(lambda: restarts.parts() >= 3)
    started = children(process.pid)
    assert len(started) >= 2
    process.kill()
    process.communicate()
    wait_until(lambda: not any(runs(pid) for pid in started))
    restarts.finish(workers=3)
    restarts.check(expected)


def wait_until(ready: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def children(pid: int) -> list[int]:
    """Return the worker processes of `pid`."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def runs(pid: int) -> bool:
    """Tell whether `pid` still runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(("workers", "limit", "kept"), [(1, 700_000, r"(\d\d) of \1"), (2, 60_000, r"0 of \d\d")])
def test_a_file_size_limit_is_explained_and_the_same_command_goes_on(
    tmp_path: Path, expected: Path, workers: int, limit: int, kept: str
) -> None:
    restarts = Restarts(tmp_path)
    # Below the first limit parts fit and the merged stream does not; below the second, no part does.
    process = restarts.start(workers, limit)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: the file size limit is reached while preparing" in message
    assert re.search(rf"{kept} parts are finished and kept", message)
    restarts.finish()
    restarts.check(expected)


def test_a_killed_worker_is_explained_and_the_same_command_goes_on(tmp_path: Path, expected: Path) -> None:
    restarts = Restarts(tmp_path)
    process = restarts.start(workers=2)
    wait_until(lambda: restarts.parts() >= 1)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, message = process.communicate(timeout=60)
    assert "a worker process ended unexpectedly" in message
    assert "fewer --workers" in message
    restarts.finish()
    restarts.check(expected)
