"""The weighted mean of checkpoints, block by block: what annealing does to a trunk, without annealing it.

Averaging the last checkpoints of a constant rate stands in for the decay of the rate (Izmailov et al. 2018, arXiv
1803.05407; with a curriculum, arXiv 2511.18903). The mean is taken in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megacpt.checkpoint.manifest import damage
from megacpt.checkpoint.pieces import Piece, PieceReader
from megacpt.checkpoint.store import checkpoint_step, checkpoints, find_checkpoint
from megacpt.config import load_run
from megacpt.continuation.boundary import RUN
from megacpt.continuation.ledger import Ledger
from megacpt.convert.derived import Progress, check_free, publish
from megacpt.convert.seen import merged_stages
from megacpt.errors import CheckpointError, ConfigError
from megacpt.runtime.layout import start_process_group

# Keys of a model that say nothing about what its weights compute.
_NAMES = ("name", "init_std")


def uniform(count: int) -> list[float]:
    """Return equal weights."""
    return [1.0 / count] * count


def exponential(count: int, alpha: float) -> list[float]:
    """Return the weights of an exponential moving average over `count` checkpoints, oldest first.

    The mean starts as the first checkpoint; each further one enters with the share `alpha`.

    Raises:
        ConfigError: if `alpha` is not in (0, 1].
    """
    if not 0 < alpha <= 1:
        raise ConfigError(f"the share of an exponential moving average is above 0 and at most 1, not {alpha:g}")
    later = [alpha * (1 - alpha) ** (count - k) for k in range(2, count + 1)]
    return [(1 - alpha) ** (count - 1), *later]


def last_checkpoints(run: Path, count: int) -> list[Path]:
    """Return the newest `count` checkpoints of a run, oldest first.

    Raises:
        ConfigError: if `count` is below 1.
        CheckpointError: if the run keeps fewer.
    """
    if count < 1:
        raise ConfigError(f"--last {count}: at least one checkpoint is needed")
    found = checkpoints(run)
    if len(found) < count:
        raise CheckpointError(
            f"{run} holds {len(found)} checkpoints, and {count} are to be averaged: take fewer, or let a run keep more "
            "with checkpoint.keep_last (null: all) and checkpoint.every"
        )
    return found[-count:]


def average(
    sources: Sequence[Path], out: Path, weights: Sequence[float] | None = None, progress: Progress | None = None
) -> Path:
    """Write the weighted mean of checkpoints as a run folder that holds one checkpoint; every rank calls this.

    The result has weights and no optimizer state, and its ledger says what all of the checkpoints have seen. At no
    time is more held than one block of one tensor, whatever the size of the model: with N ranks, each makes 1/N of it.

    Args:
        sources: checkpoints, or run folders for their newest; the last one gives the configuration.
        out: a new folder.
        weights: a number for each checkpoint, 0 or more; they are divided by their sum. None for equal ones.
        progress: told after each block: how many of this rank's are written, and how many there are in all.

    Returns:
        The new checkpoint.

    Raises:
        ConfigError: the weights do not fit, or `out` holds a run already.
        CheckpointError: a checkpoint is damaged, or they are not of the same model.
    """
    shares = _shares(weights if weights is not None else uniform(len(sources)), len(sources))
    return _sum(sources, out, shares, "average", progress)


def task_vectors(base: Path, tuned: Sequence[tuple[Path, float]], out: Path, progress: Progress | None = None) -> Path:
    """Write a base plus multiples of what training changed in checkpoints that were continued from it.

    A task vector is the difference of a continued checkpoint and its base; sums of such vectors join what was learned,
    and a negative multiple takes it away (Ilharco et al. 2023, arXiv 2212.04089).

    Args:
        base: a checkpoint, or a run folder for its newest.
        tuned: checkpoints likewise, each with the multiple of its vector.
        out: a new folder.
        progress: as for `average`.

    Returns:
        The new checkpoint.

    Raises:
        ConfigError: a multiple is no number, or `out` holds a run already.
        CheckpointError: as `average`.
    """
    multiples = [multiple for _, multiple in tuned]
    if not tuned or not all(map(math.isfinite, multiples)):
        raise ConfigError(f"multiples of task vectors are numbers, at least one: {multiples}")
    shares = [1.0 - math.fsum(multiples), *multiples]
    return _sum([base, *(path for path, _ in tuned)], out, shares, "task-vectors", progress)


def _sum(sources: Sequence[Path], out: Path, shares: list[float], operation: str, progress: Progress | None) -> Path:
    """Write the weighted sum of checkpoints of one model; the last one gives the configuration."""
    start_process_group()
    folders = [find_checkpoint(path) for path in sources]
    check_free(out)
    ledgers = [Ledger.read(folder) for folder in folders]
    _check_same_model(folders, ledgers)
    for folder in folders:
        if (wrong := damage(folder)) is not None:
            raise CheckpointError(f"the checkpoint is damaged: {wrong}; leave it out, or restore it from a backup")
    readers = [PieceReader(folder) for folder in folders]
    _check_same_tensors(readers)

    ledger = replace(
        ledgers[-1],
        parent=ledgers[-1].id,
        parent_path=str(folders[-1].resolve()),
        stages=merged_stages([ledger.stages for ledger in ledgers]),
        derived={"operation": operation, "of": [ledger.id for ledger in ledgers], "weights": shares},
    )
    config = load_run(folders[-1] / RUN).model_copy(update={"run": out})

    def summed(piece: Piece) -> Tensor:
        total = torch.zeros(piece.sizes, dtype=torch.float64)
        for reader, share in zip(readers, shares, strict=True):
            total.add_(reader.read(piece), alpha=share)
        return total.to(piece.dtype)

    return publish(config, ledger, checkpoint_step(folders[-1]), readers[-1].pieces(), summed, progress)


def _shares(weights: Sequence[float], count: int) -> list[float]:
    """Divide the weights by their sum."""
    if len(weights) != count:
        raise ConfigError(f"{count} checkpoints need as many weights, and there are {len(weights)}")
    whole = math.fsum(weights)
    if any(not math.isfinite(w) or w < 0 for w in weights) or not whole > 0:
        raise ConfigError(f"weights are numbers from 0 on, and not all 0: {', '.join(f'{w:g}' for w in weights)}")
    return [weight / whole for weight in weights]


def _check_same_model(folders: Sequence[Path], ledgers: Sequence[Ledger]) -> None:
    """Refuse checkpoints of other networks or tokenizers than the last one's."""
    last, name = ledgers[-1], folders[-1]
    for folder, ledger in zip(folders, ledgers, strict=True):
        if ledger.tokenizer["fingerprint"] != last.tokenizer["fingerprint"]:
            raise CheckpointError(f"{folder} and {name} have different tokenizers: their weights mean different things")
        keys = (set(ledger.model) | set(last.model)).difference(_NAMES)
        other = [key for key in sorted(keys) if ledger.model.get(key) != last.model.get(key)]
        if other:
            what = ", ".join(f"model.{key} ({ledger.model.get(key)} and {last.model.get(key)})" for key in other)
            raise CheckpointError(f"{folder} and {name} are of different models: {what}")


def _check_same_tensors(readers: Sequence[PieceReader]) -> None:
    """Refuse checkpoints that lack weights of the last one, or have others."""
    last = readers[-1].shapes()
    for reader in readers:
        if differing := {name for name, _ in reader.shapes().items() ^ last.items()}:
            raise CheckpointError(
                f"{reader.folder} and {readers[-1].folder} hold different weights: {', '.join(sorted(differing)[:5])}"
            )
