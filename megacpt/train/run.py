"""A run from its configuration to its last checkpoint: started, or resumed exactly."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megacpt.checkpoint.store import Retention, Store, checkpoints, load_checkpoint
from megacpt.config import RunConfig, check
from megacpt.continuation.boundary import create_run, first_ledger, started
from megacpt.continuation.carry import load_parent
from megacpt.continuation.ledger import Ledger
from megacpt.continuation.planning.past import before_stage, past_streams
from megacpt.continuation.planning.repeats import repetitions
from megacpt.continuation.resume import check_resume, find_data, parent_of
from megacpt.data.stage_data import StageData
from megacpt.data.tokenizer import Tokenizer, load_tokenizer
from megacpt.engine.megatron import MegatronEngine
from megacpt.errors import ConfigError
from megacpt.runtime.layout import is_first_rank, start_process_group, world_size
from megacpt.train.callbacks.checkpoint import CALLBACKS, Checkpoints
from megacpt.train.callbacks.controller import MixtureController
from megacpt.train.callbacks.evaluation import Evaluation
from megacpt.train.callbacks.health import Health, Signals
from megacpt.train.callbacks.metrics import Metrics
from megacpt.train.callbacks.progress import ProgressBar
from megacpt.train.callbacks.routing import Routing
from megacpt.train.loop import Callback, Run, train_loop

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a session of a run ended.

    Attributes:
        checkpoint: the newest checkpoint.
        complete: the stage reached its end; otherwise the same command goes on.
        ledger: what the checkpoint has seen.
    """

    checkpoint: Path
    complete: bool
    ledger: Ledger


def train(config: RunConfig, parent: Path | None = None) -> Outcome:
    """Start a run, or resume it exactly where its newest good checkpoint is; every rank calls this.

    Args:
        config: the run.
        parent: the checkpoint that a new run starts from; None for new weights.

    Raises:
        MegacptError: configuration, streams or checkpoints are not as they should be.
    """
    start_process_group()
    tokenizer = load_tokenizer(config.tokenizer)
    check(config, world_size(), tokenizer.vocab_size)
    start = _start(config, parent, tokenizer)
    checkpoint = config.checkpoint
    store = Store(
        config.run,
        Retention(
            last=checkpoint.keep_last,
            every=None
            if checkpoint.keep_every is None
            else checkpoint.keep_every.steps(config.stage.tokens, config.tokens_per_step),
            best=checkpoint.keep_best,
        ),
    )
    data = StageData(start.stage.plan, tokenizer=tokenizer)
    engine = MegatronEngine(config, tokenizer.vocab_size)
    run = Run(config, engine, tokenizer, data, start, store, str(engine.layout))
    callbacks = _callbacks()
    newest = store.newest_good()
    if newest is not None:
        load_checkpoint(newest, engine, verified=True)
        _restore(run, callbacks, newest)
    elif (origin := parent_of(start)) is not None:
        load_parent(origin, engine, start)
    if not run.layouts or run.layouts[-1] != run.layout:
        run.layouts = (*run.layouts, run.layout)
    if not run.done or newest is None:
        train_loop(run, callbacks)
    return Outcome(store.path(run.step), run.done, run.ledger())


def _start(config: RunConfig, parent: Path | None, tokenizer: Tokenizer) -> Ledger:
    """Return the ledger at the start of the run, creating the run folder if there is none yet.

    A run that has saved nothing may still start over with other settings, or from another checkpoint.
    """
    start = started(config.run)
    if start is not None:
        try:
            check_resume(config, start, parent)
        except ConfigError:
            if checkpoints(config.run) or (parent is None and start.parent is not None):
                raise
            if is_first_rank():
                log.warning("%s had saved nothing yet: it starts over with the new settings", config.run)
            start = None
    # Every rank looks before the first one writes, so that all of them take the same branch.
    dist.barrier()
    if start is None:
        start = first_ledger(config, parent)  # every rank finds a mistake here, and none waits for the others
        data = StageData(start.stage.plan, tokenizer=tokenizer)
        if is_first_rank():
            create_run(config, start)
            for warning in repetitions(config, past_streams(before_stage(start)), data):
                log.warning("%s", warning)
        dist.barrier()
    return find_data(start, config)


def _callbacks() -> list[Callback]:
    """Return the callbacks in the order in which they act."""
    metrics = Metrics()
    evaluation = Evaluation(metrics)
    shown: list[Callback] = [evaluation, ProgressBar(metrics, evaluation)]
    beside: list[Callback] = [Routing(metrics, evaluation), MixtureController(metrics, evaluation)]
    before = [Signals(), metrics, Health(), *shown, *beside]
    return [*before, Checkpoints(before)]


def _restore(run: Run, callbacks: list[Callback], checkpoint: Path) -> None:
    """Put the run and its callbacks where the checkpoint left them."""
    stage = Ledger.read(checkpoint).stage
    run.step, run.seconds, run.layouts = stage.steps, stage.seconds, stage.layouts
    run.data, run.controller = run.data.with_phases(stage.plan.phases), stage.controller
    states = json.loads((checkpoint / CALLBACKS).read_text())
    for callback in callbacks:
        callback.load(states.get(callback.name, {}))
    scores = states.get(Checkpoints.name, {}).get("scores", {})
    run.store.scores.update({int(step): float(score) for step, score in scores.items()})
