"""Saving checkpoints during training."""

from __future__ import annotations

import json
from collections.abc import Sequence

from megacpt.config import dump
from megacpt.continuation.boundary import RUN
from megacpt.continuation.ledger import LEDGER
from megacpt.engine.protocol import StepReport
from megacpt.train.callbacks import Quiet, due
from megacpt.train.loop import Callback, Run

CALLBACKS = "callbacks.json"


class Checkpoints(Quiet):
    """Saves every so often, at the end of the stage, and when the run is asked to stop.

    Args:
        others: the callbacks whose state goes into the checkpoint; this one comes last among them.
    """

    name = "checkpoints"

    def __init__(self, others: Sequence[Callback]) -> None:
        self.others = others
        self.saved = -1

    def on_start(self, run: Run) -> None:
        """Work out the interval."""
        self.every = run.config.checkpoint.every.steps(run.config.stage.tokens, run.config.tokens_per_step)
        self.saved = run.step if run.step else -1

    def on_step(self, run: Run, report: StepReport) -> None:  # noqa: ARG002
        """Save when it is due, and complete what is being written in the background."""
        run.store.poll()
        if due(run.step, self.every, run.done or run.stopping):
            self._save(run)

    def on_end(self, run: Run) -> None:
        """Leave nothing unwritten."""
        if self.saved != run.step:
            self._save(run)
        run.store.poll(wait=True)

    def _save(self, run: Run) -> None:
        scores = {str(step): score for step, score in run.store.scores.items()}
        callbacks = {callback.name: callback.state() for callback in self.others}
        files = {
            LEDGER: run.ledger().to_json(),
            RUN: dump(run.config),
            CALLBACKS: json.dumps({**callbacks, self.name: {"scores": scores}}, indent=1),
        }
        run.store.save(run.step, run.engine.state(), files, run.config.checkpoint.asynchronous)
        self.saved = run.step
