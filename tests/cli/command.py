"""The command line in a process of its own, without paying for the imports each time."""

from __future__ import annotations

import multiprocessing
import os
import resource
import socket
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.pool import PRELOAD


@dataclass(frozen=True)
class Result:
    """How a command ended: its exit status, and what it printed."""

    status: int | None
    out: str
    err: str


def _main(arguments: list[str], folder: str, largest_file: int | None, rank: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(MEGACPT_DEVICE="cpu", OMP_NUM_THREADS="1", COLUMNS="400", TERM="dumb", **rank)
    suffix = rank.get("RANK", "").strip("0")
    for number, name in ((1, f".out{suffix}"), (2, f".err{suffix}")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["megacpt", *arguments]
    import torch

    from megacpt.cli.main import main

    torch.set_num_threads(1)
    main()


def launch(
    *arguments: str | Path, folder: Path, largest_file: int | None = None, rank: dict[str, str] | None = None
) -> BaseProcess:
    """Start ``megacpt ARGUMENTS`` in `folder`; with `largest_file`, writes beyond that many bytes of a file fail.

    `rank` is what torchrun says of a rank in its environment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_main, args=(list(map(str, arguments)), str(folder), largest_file, rank or {}))
    process.start()
    return process


def launch_ranks(*arguments: str | Path, folder: Path, ranks: int) -> list[BaseProcess]:
    """Start ``megacpt ARGUMENTS`` as torchrun would, on `ranks` processes of this machine."""
    if ranks == 1:
        return [launch(*arguments, folder=folder)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        launch(*arguments, folder=folder, rank={**world, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(ranks)
    ]


def finish(process: BaseProcess, folder: Path, timeout: float = 120.0) -> Result:
    """Wait for a command that was launched in `folder`, and return how it ended."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"the command did not end in {timeout:g} s:\n{(folder / '.err').read_text()}")
    return Result(process.exitcode, (folder / ".out").read_text(), (folder / ".err").read_text())


def megacpt(*arguments: str | Path, folder: Path, largest_file: int | None = None, timeout: float = 120.0) -> Result:
    """Run ``megacpt ARGUMENTS`` in `folder` to its end; arguments as `launch`."""
    return finish(launch(*arguments, folder=folder, largest_file=largest_file), folder, timeout)
