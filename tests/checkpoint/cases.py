"""What the ranks of a pool run: saving, damaging and loading checkpoints of a small model."""

from __future__ import annotations

import errno
import hashlib
import logging
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megacpt.checkpoint import manifest
from megacpt.checkpoint.store import Retention, Store, load_checkpoint
from megacpt.checkpoint.tensors import load_tensors, save_tensors
from megacpt.engine.megatron import MegatronEngine
from megacpt.engine.protocol import Batch
from megacpt.errors import MegacptError
from tests.small import run_config

VOCAB = 257
LEDGER = "the ledger as text"


def engine(**changes: Any) -> MegatronEngine:
    """A small model with its optimizer; `changes` are sections of the configuration."""
    return MegatronEngine(run_config("unused", {"synthetic": "unused"}, **changes), VOCAB)


def step(trained: MegatronEngine, number: int) -> None:
    """One optimizer step on tokens that depend on `number` alone."""
    rows = np.random.default_rng(number).integers(0, VOCAB, (4, 17))
    mine = rows[trained.data_rank :: trained.data_size]
    trained.train_step([Batch(row[None]) for row in mine], 1e-2, 0.1)


def contents(trained: MegatronEngine) -> dict[str, np.ndarray]:
    """Every tensor of the engine's state by name, in float32; whole tensors where there is no tensor parallelism."""
    found = {}
    for name, part in trained.state().items():
        data = getattr(part, "data", part)
        found[name] = np.array(data) if not torch.is_tensor(data) else data.detach().float().numpy().copy()
    return found


def digests(trained: MegatronEngine) -> dict[str, str]:
    """A hash of every tensor of the engine's state."""
    return {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in contents(trained).items()}


def message(action: Callable[[], Any]) -> str:
    """What the error of `action` says; it has to be one of megacpt's own."""
    try:
        action()
    except MegacptError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("there was no error")


def describe(folder: str) -> dict[str, Any]:
    """Make a manifest."""
    return manifest.make_manifest(Path(folder))


def damage(folder: str, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint."""
    return manifest.damage(Path(folder), hashes)


def damages(folder: str, files: list[tuple[str, bytes]]) -> list[str | None]:
    """What is wrong with a checkpoint when each of the `files` in turn has other bytes."""
    found = []
    for name, content in files:
        path = Path(folder) / name
        kept = path.read_bytes()
        path.write_bytes(content)
        found.append(manifest.damage(Path(folder)))
        path.write_bytes(kept)
    return found


def save(
    run: str,
    steps: list[int],
    asynchronous: bool = False,
    retention: dict[str, Any] | None = None,
    scores: dict[int, float] | None = None,
    **changes: Any,
) -> list[dict[str, str]]:
    """Train to each of `steps` and save there; return the hashes of what was saved."""
    store = Store(Path(run), Retention(**(retention or {"last": None})))
    store.scores.update(scores or {})
    trained = engine(**changes)
    found, done = [], 0
    for number in steps:
        while done < number:
            step(trained, done)
            done += 1
        found.append(digests(trained))
        store.save(number, trained.state(), {"ledger.json": f"{LEDGER} {number}"}, asynchronous)
    store.poll(wait=True)
    return found


def save_in_background(run: str) -> dict[str, Any]:
    """Save in the background while training goes on; return what was there at which moment."""
    store = Store(Path(run))
    trained = engine()
    step(trained, 0)
    saved = digests(trained)
    path = store.save(1, trained.state(), {"ledger.json": LEDGER}, asynchronous=True)
    during = path.exists()
    step(trained, 1)
    store.poll(wait=True)
    files = sorted(file.name for file in path.iterdir())
    return {"saved": saved, "during": during, "files": files, "later": digests(trained)}


def save_after_one_given_up(run: str) -> dict[str, str]:
    """Give up a save in the background, and save a larger model; return the hashes of the latter."""
    first, second = Store(Path(run) / "given up"), engine(model={"ffn": 96})
    first.save(1, engine().state(), {}, asynchronous=True)
    Store(Path(run)).save(1, second.state(), {})
    return digests(second)


def newest(run: str) -> tuple[str | None, list[str]]:
    """The newest good checkpoint of a run, and the warnings on the way."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megacpt.checkpoint.store")
    logger.addHandler(handler)
    try:
        found = Store(Path(run)).newest_good()
    finally:
        logger.removeHandler(handler)
    return (None if found is None else found.name), warnings


def newest_error(run: str) -> str:
    """What is said when no checkpoint of a run is good."""
    return message(lambda: Store(Path(run)).newest_good())


def load(folder: str, **changes: Any) -> dict[str, str]:
    """Load a checkpoint; return the hashes of what is there then."""
    loaded = engine(**changes)
    load_checkpoint(Path(folder), loaded)
    return digests(loaded)


def load_error(folder: str, verified: bool = True, **changes: Any) -> str:
    """What is said when a checkpoint is loaded that should not be; unless `verified`, its hashes are not looked at."""
    loaded = engine(**changes)
    if verified:
        return message(lambda: load_checkpoint(Path(folder), loaded))
    return message(lambda: load_tensors(loaded.state(), Path(folder)))


def convert(save_to: str, load_from: str | None = None, steps: int = 0, **changes: Any) -> dict[str, Any]:
    """Load, train and save under one configuration; return the contents in full."""
    trained = engine(**changes)
    if load_from:
        trained.load(load_tensors(trained.state(), Path(load_from)))
    for number in range(steps):
        step(trained, number)
    found = contents(trained)
    model = [p.detach().float().numpy().copy() for chunk in trained.chunks for p in chunk.parameters()]
    save_tensors(trained.state(), Path(save_to))
    return {"state": found, "model": model}


@contextmanager
def small_files(largest: int) -> Iterator[None]:
    """Let every write beyond `largest` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def full_disk(rank: int) -> Iterator[None]:
    """Let the tensors of one rank meet a full disk."""

    def write(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = filesystem_async._write_item
    if torch.distributed.get_rank() == rank:
        filesystem_async._write_item = write
    try:
        yield
    finally:
        filesystem_async._write_item = kept


def fail(run: str, how: str, asynchronous: bool) -> dict[str, Any]:
    """Save step 1, fail to save step 2, load step 1, and save step 2 once there is room again."""
    store = Store(Path(run), Retention(last=1))
    layout = {"parallel": {"tensor": torch.distributed.get_world_size()}}  # so that every rank writes
    trained = engine(**layout)
    step(trained, 0)
    good = digests(trained)
    store.save(1, trained.state(), {"ledger.json": LEDGER})
    step(trained, 1)

    ledger = LEDGER * 100_000  # larger than the tensors

    def save_again() -> None:
        store.save(2, trained.state(), {"ledger.json": ledger}, asynchronous)
        store.poll(wait=True)

    trouble = {
        "tensors": lambda: small_files(2000),
        "ledger": lambda: small_files(len(ledger) - 1),
        "first": lambda: full_disk(0),
        "last": lambda: full_disk(torch.distributed.get_world_size() - 1),
    }[how]
    with trouble():
        said = message(save_again)
    left = sorted(path.name for path in Path(run, "checkpoints").glob("step-*"))
    wrong = manifest.damage(Path(run, "checkpoints", "step-00000001"))
    again = engine(**layout)
    load_checkpoint(Path(run, "checkpoints", "step-00000001"), again)
    same = digests(again) == good
    save_again()
    later = sorted(path.name for path in Path(run, "checkpoints").iterdir())
    return {"said": said, "left": left, "wrong": wrong, "same": same, "later": later}
