"""Changing the mixture during training, from what the evaluations measure."""

from __future__ import annotations

from megacpt.continuation.controller import Controller, build_controller, watched_streams
from megacpt.continuation.planning import old_weights
from megacpt.continuation.planning.shares import with_replay
from megacpt.engine.protocol import StepReport
from megacpt.evaluate.loss import StreamLoss
from megacpt.train.callbacks import Quiet
from megacpt.train.callbacks.evaluation import Evaluation
from megacpt.train.callbacks.metrics import Metrics
from megacpt.train.loop import Run


class MixtureController(Quiet):
    """Lets the controller of the stage decide after each evaluation; what it decides holds from the next step on.

    The state of the controller is in the ledger, its decisions in the metrics too (lines of kind ``controller``).

    Args:
        metrics: where the decisions are written.
        evaluation: where the held-out losses come from; it acts before this callback.
    """

    name = "controller"

    def __init__(self, metrics: Metrics, evaluation: Evaluation) -> None:
        self.metrics, self.evaluation = metrics, evaluation
        self.controller: Controller | None = None
        self.known: list[StreamLoss] = []

    def on_start(self, run: Run) -> None:
        """Build the controller; at the start of the stage, show it the losses that it has to keep."""
        settings = run.config.stage.controller
        if settings is None:
            return
        self.controller = build_controller(settings)
        self.watched = watched_streams(run.config)
        self.old = old_weights(run.config, run.start, run.tokenizer)
        if run.controller is None:
            run.controller = dict(self.controller.begin(float(run.config.stage.replay.share), self._losses()))
        self.known = self.evaluation.latest

    def on_step(self, run: Run, report: StepReport) -> None:  # noqa: ARG002
        """Decide where there was an evaluation; the last one of a stage changes nothing any more."""
        if self.controller is None or run.controller is None or run.done or self.evaluation.latest is self.known:
            return
        self.known = self.evaluation.latest
        before = run.controller
        run.controller = dict(self.controller.decide(before, run.step, self._losses()))
        if run.controller == before:
            return
        if run.controller["share"] != before["share"]:
            start = run.step * run.config.batch.sequences
            plan = with_replay(run.data.plan, start, run.controller["share"], self.old)
            run.data = run.data.with_phases(plan.phases)
        progress = {"step": run.step, "tokens": run.tokens, "lineage_tokens": run.lineage_tokens}
        self.metrics.write({"kind": "controller", **progress, **run.controller["decisions"][-1]})

    def _losses(self) -> dict[str, float]:
        return {found.stream: found.bits_per_byte for found in self.evaluation.latest if found.stream in self.watched}
