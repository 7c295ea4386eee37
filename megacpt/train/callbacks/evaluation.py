"""Evaluation on held-out streams during training."""

from __future__ import annotations

from typing import Any

from megacpt.data.stream import TokenStream
from megacpt.engine.protocol import StepReport
from megacpt.evaluate.grid import Grid
from megacpt.evaluate.loss import StreamLoss, evaluate_stream
from megacpt.train.callbacks import Quiet
from megacpt.train.callbacks.metrics import Metrics
from megacpt.train.loop import Run


class Evaluation(Quiet):
    """Measures the held-out streams at the start, every so often, and at the end of a stage; closely after a boundary.

    Attributes:
        latest: the last results.
    """

    name = "evaluation"

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.latest: list[StreamLoss] = []
        self.streams: dict[str, TokenStream] = {}

    def on_start(self, run: Run) -> None:
        """Open the streams, and measure before the first step."""
        settings = run.config.evaluate
        self.grid = _grid(run)
        self.streams = {
            name: TokenStream.open(path, tokenizer=run.tokenizer) for name, path in settings.streams.items()
        }
        if run.step == 0:
            self._measure(run)

    def on_step(self, run: Run, report: StepReport) -> None:  # noqa: ARG002
        """Measure when it is due."""
        if run.step in self.grid:
            self._measure(run)

    def _measure(self, run: Run) -> None:
        config, settings = run.config, run.config.evaluate
        length = settings.seq_length or config.batch.seq_length
        self.latest = [
            evaluate_stream(run.engine, name, stream, length, settings.tokens, config.batch.microbatch)
            for name, stream in self.streams.items()
        ]
        self.metrics.evaluation(run, self.latest)
        if self.latest:
            run.store.scores[run.step] = sum(result.loss for result in self.latest) / len(self.latest)

    def state(self) -> dict[str, Any]:
        """Keep the results, for the choice of the best checkpoints."""
        return {"latest": [vars(result) for result in self.latest]}

    def load(self, state: dict[str, Any]) -> None:
        """Take over the results."""
        self.latest = [StreamLoss(**result) for result in state.get("latest", [])]


def _grid(run: Run) -> Grid:
    """The steps at which the streams of `run` are measured."""
    config, settings = run.config, run.config.evaluate
    every, dense = (
        0 if duration is None else duration.steps(config.stage.tokens, config.tokens_per_step)
        for duration in (settings.every, settings.dense)
    )
    return Grid(every, config.stage_steps, 0 if run.start.parent is None else dense)
