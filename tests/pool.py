"""Worker pools: ranks that are started once and run many distributed cases.

Starting ranks (importing torch and Megatron in each) costs far more than a test case. The ranks are forked from a
server process that has imported everything and has run nothing, so that a pool of any size is there in a second.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOAD = ["megacpt.train.run", "megacpt.cli.main", "tests.distributed.cases"]


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    """Run the cases that arrive, until told to stop."""
    import torch
    import torch.distributed as dist

    os.environ["MEGACPT_DEVICE"] = "cpu"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (job := pipe.recv()) is not None:
        module, function, arguments = job
        try:
            pipe.send((True, getattr(importlib.import_module(module), function)(**arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Pool:
    """`size` ranks of one gloo process group that wait for work.

    Args:
        size: the number of ranks.
    """

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder = tempfile.TemporaryDirectory(prefix="megacpt-pool-")
        self.size = size
        self.pipes: list[Connection] = []
        self.ranks = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, str(Path(self.folder.name) / "store"), theirs), daemon=False
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.ranks.append(process)

    def run(self, case: str, timeout: float = 120.0, **arguments: Any) -> list[Any]:
        """Run ``module:function`` with the same arguments on every rank; return the results in rank order.

        A rank that raises ends the pool: the others may be waiting for it in a collective.
        """
        for pipe in self.pipes:
            pipe.send((*case.split(":"), arguments))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout):
                self.close(kill=True)
                raise TimeoutError(f"rank {rank} of {self.size} gave no answer to {case} in {timeout:g} s")
            good, answer = pipe.recv()
            if not good:
                self.close(kill=True)
                raise AssertionError(f"rank {rank} of {self.size} in {case}:\n{answer}")
            results.append(answer)
        return results

    @property
    def alive(self) -> bool:
        """Whether every rank can take another case."""
        return all(rank.is_alive() for rank in self.ranks)

    def close(self, kill: bool = False) -> None:
        """Stop the ranks."""
        for pipe, rank in zip(self.pipes, self.ranks, strict=True):
            if kill:
                rank.kill()
            elif rank.is_alive():
                pipe.send(None)
        for rank in self.ranks:
            rank.join(20)
        self.folder.cleanup()


class Pools:
    """Pools by size, made when first asked for and shared by all tests of a session."""

    def __init__(self) -> None:
        self.pools: dict[int, Pool] = {}

    def __call__(self, size: int) -> Pool:
        """Return the pool of `size` ranks, a new one if the last broke."""
        if size not in self.pools or not self.pools[size].alive:
            self.pools[size] = Pool(size)
        return self.pools[size]

    def close(self) -> None:
        """Stop all ranks."""
        for pool in self.pools.values():
            if pool.alive:
                pool.close()
