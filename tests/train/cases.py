"""What the ranks of a pool run: sessions of a run that end early, crash or go wrong at a given step."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megacpt.checkpoint.store import Store, load_checkpoint
from megacpt.checkpoint.tensors import check_metadata
from megacpt.config import RunConfig, dump, load_run
from megacpt.continuation.boundary import RUN
from megacpt.continuation.ledger import LEDGER, Ledger
from megacpt.engine.megatron import MegatronEngine
from megacpt.engine.protocol import Batch, StepReport
from megacpt.errors import MegacptError
from megacpt.train.run import train

Step = Callable[..., StepReport]


class Crash(BaseException):
    """The power fails."""


def _ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _crash() -> None:
    raise Crash


@contextmanager
def _spoiled(engine: MegatronEngine) -> Iterator[None]:
    """Let one weight be no number, so that loss and gradient are none either."""
    weight = next(engine.chunks[0].parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[:] = float("nan")
    yield
    with torch.no_grad():
        weight.copy_(kept)


@contextmanager
def _watched(at: int | None, how: str | None, until: int | None) -> Iterator[list[list[str]]]:
    """Note a hash of every sample of every step; from step `at` of the session to `until`, let `how` happen."""
    seen: list[list[str]] = []
    original: Step = MegatronEngine.train_step

    def train_step(self: MegatronEngine, batches: Sequence[Batch], rate: float, weight_decay: float) -> StepReport:
        number = len(seen) + 1
        hit = at is not None and at <= number <= (at if until is None else until)
        first_only = how == "stop last rank" and dist.get_rank() != dist.get_world_size() - 1
        if hit and how == "crash":
            _crash()
        if hit and how in ("stop", "stop last rank") and not first_only:
            _ask_to_stop()
        seen.append([hashlib.sha256(row.tobytes()).hexdigest() for batch in batches for row in batch.tokens])
        if hit and how == "nan":
            with _spoiled(self):
                return original(self, batches, rate, weight_decay)
        return original(self, batches, rate, weight_decay)

    MegatronEngine.train_step = train_step  # type: ignore[method-assign]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        MegatronEngine.train_step = original  # type: ignore[method-assign]
        for number, handler in handlers.items():
            signal.signal(number, handler)


def session(
    config: dict[str, Any],
    parent: str | None = None,
    at: int | None = None,
    how: str | None = None,
    until: int | None = None,
) -> dict[str, Any]:
    """One session of a run: started, or resumed.

    Args:
        config: the run.
        parent: the checkpoint that the run starts from.
        at: the step of this session, from 1, at which something happens.
        how: ``crash``, ``stop`` (SIGTERM), ``stop last rank`` or ``nan``.
        until: the last step at which it happens; `at` if None.

    Returns:
        How it ended, and ``rows``: the hashes of this rank's samples of each step.
    """
    run = RunConfig.model_validate(config)
    found: dict[str, Any] = {"crashed": False, "error": None}
    with _watched(at, how, until) as rows:
        try:
            outcome = train(run, None if parent is None else Path(parent))
        except Crash:
            found["crashed"] = True
        except MegacptError as error:
            found["error"] = (type(error).__name__, error.exit_code, str(error))
        else:
            found.update(complete=outcome.complete, checkpoint=str(outcome.checkpoint), ledger=outcome.ledger.to_json())
    listening = signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    return {**found, "rows": rows, "listening": listening}


def weights_alone(folder: str, out: str) -> dict[str, Any]:
    """Write the weights of a checkpoint as those of an average, without an optimizer's state; return where and what."""
    path, run = Path(folder), Path(out)
    ledger = Ledger.read(path)
    config = load_run(path / RUN).model_copy(update={"run": run})
    engine = MegatronEngine(config, 257, train=False)
    load_checkpoint(path, engine)
    averaged = replace(ledger, derived={"operation": "average", "of": [ledger.id], "weights": [1.0]})
    made = Store(run).save(1, engine.state(), {LEDGER: averaged.to_json(), RUN: dump(config)})
    return {"checkpoint": str(made), "stored": sorted(check_metadata(made).state_dict_metadata)}
