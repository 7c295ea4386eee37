"""A run folder whose one checkpoint is made of other weights, block by block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from megacpt.checkpoint.block_writer import Make, write_pieces
from megacpt.checkpoint.pieces import Piece
from megacpt.checkpoint.store import Retention, Store
from megacpt.config import RunConfig, dump
from megacpt.continuation.boundary import RUN, create_run, started
from megacpt.continuation.ledger import LEDGER, Ledger
from megacpt.errors import ConfigError
from megacpt.runtime.layout import is_first_rank

Progress = Callable[[int, int], None]


def check_free(out: Path) -> None:
    """Refuse a folder that holds a run.

    Raises:
        ConfigError: if it does.
    """
    if started(out) is not None:
        raise ConfigError(f"{out} holds a run already: choose another --out, or remove it")


def publish(
    config: RunConfig,
    ledger: Ledger,
    step: int,
    pieces: Sequence[Piece],
    make: Make,
    progress: Progress | None = None,
    workers: int = 1,
    source: str | None = None,
) -> Path:
    """Write the checkpoint, each block computed when its turn comes, then the run around it; every rank calls this.

    At no time is more held than `make` needs for one block. With N ranks, each makes 1/N of the blocks.

    Args:
        config: of the run; `config.run` is the folder.
        ledger: of the checkpoint.
        step: the number in its name.
        pieces: blocks that make up whole tensors.
        make: returns the numbers of a block on the CPU.
        progress: told after each block: how many of this rank's are made, and how many there are in all.
        workers: see `write_pieces`; with more than one, so many blocks more are held.
        source: see `write_pieces`; what an interrupted call with the same one has written is kept.

    Returns:
        The checkpoint.

    Raises:
        ConfigError: `config.run` holds a run already.
        CheckpointError: the disk fails, or as `make` does.
    """
    check_free(config.run)
    made = counted(make, len(pieces), progress)
    files = {LEDGER: ledger.to_json(), RUN: dump(config)}
    store = Store(config.run, Retention(last=None))
    folder = store.publish(
        step, lambda place: write_pieces(place, pieces, made, workers, source), files, source is not None
    )
    if is_first_rank():
        create_run(config, ledger)
    return folder


def counted(make: Make, total: int, progress: Progress | None) -> Make:
    """Let `progress` hear of each block that is made: how many there are so far, and how many in all."""
    done = itertools.count(1)

    def made(piece: Piece) -> Tensor:
        found = make(piece)
        number = next(done)
        if progress is not None:
            progress(number, total)
        return found

    return made
