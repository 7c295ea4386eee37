"""The train loop: batch, rate, step; everything else is a callback."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from megacpt.checkpoint.store import Store
from megacpt.config import RunConfig
from megacpt.continuation.ledger import Ledger
from megacpt.data.batches import microbatches
from megacpt.data.stage_data import StageData
from megacpt.data.tokenizer import Tokenizer
from megacpt.engine.protocol import Batch, Engine, StepReport
from megacpt.optim.schedules import Schedule, schedule_from_dict


@dataclass
class Run:
    """A stage in training: what it consists of, and how far it is.

    Attributes:
        config: the run as resolved.
        engine: makes the steps.
        tokenizer: the model's.
        data: sample g of the stage; a controller may change its phases.
        start: the ledger at the start of the stage.
        store: where checkpoints go.
        layout: the parallel layout, in words.
        step: optimizer steps made.
        seconds: wall time of earlier sessions and this one.
        stopping: leave the loop after this step, to go on later.
        controller: state of the controller of the mixture; None without one.
        closing: what has to be undone when the session ends, however it ends.
    """

    config: RunConfig
    engine: Engine
    tokenizer: Tokenizer
    data: StageData
    start: Ledger
    store: Store
    layout: str
    step: int = 0
    seconds: float = 0.0
    layouts: tuple[str, ...] = ()
    stopping: bool = False
    controller: dict[str, Any] | None = None
    closing: ExitStack = field(default_factory=ExitStack)
    schedule: Schedule = field(init=False)

    def __post_init__(self) -> None:
        self.schedule = schedule_from_dict(self.start.stage.schedule)

    @property
    def tokens(self) -> int:
        """Tokens of the stage consumed so far."""
        return self.step * self.config.tokens_per_step

    @property
    def lineage_tokens(self) -> int:
        """Tokens of the whole lineage consumed so far."""
        return self.start.tokens + self.tokens

    @property
    def done(self) -> bool:
        """Whether the stage is complete."""
        return self.step >= self.config.stage_steps

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 1."""
        tokens = step * self.config.tokens_per_step
        return self.schedule.rate(tokens, self._horizon, self.start.stage.entry_rate)

    def weight_decay(self, step: int) -> float:
        """The weight decay of optimizer step `step`, counted from 1."""
        return self.schedule.weight_decay(self.config.optim.weight_decay, step * self.config.tokens_per_step)

    def phase(self) -> str:
        """The phase of the schedule after the last step."""
        return self.schedule.phase(self.tokens, self._horizon, self.start.stage.entry_rate)

    @property
    def _horizon(self) -> int:
        """The tokens of all steps of the stage: the last step ends exactly at the end of the schedule."""
        return self.config.stage_steps * self.config.tokens_per_step

    def batches(self) -> list[Batch]:
        """This rank's microbatches of the next step."""
        batch, engine = self.config.batch, self.engine
        found = microbatches(
            self.data, self.step, batch.sequences, batch.microbatch, engine.data_rank, engine.data_size
        )
        return [Batch(tokens) for tokens in found]

    def ledger(self) -> Ledger:
        """The ledger as of now."""
        plan = self.data.plan
        counts = self.data.counts(self.step * self.config.batch.sequences)
        names = [source.name for source in plan.sources]
        return self.start.with_stage(
            tokens=self.tokens,
            steps=self.step,
            plan=plan,
            consumed={name: n * plan.seq_length for name, n in zip(names, counts, strict=True)},
            repeats={name: counts[i] / self.data.distinct(i) for i, name in enumerate(names)},
            rate=self.rate(self.step) if self.step else self.start.stage.entry_rate,
            phase=self.phase(),
            layouts=self.layouts,
            seconds=round(self.seconds, 3),
            controller=self.controller,
        )


class Callback(Protocol):
    """Something that happens beside training. What it keeps in `state` is in every checkpoint."""

    name: str

    def on_start(self, run: Run) -> None:
        """Before the first step of this session."""

    def on_step(self, run: Run, report: StepReport) -> None:
        """After each step; `run.step` counts it already."""

    def on_end(self, run: Run) -> None:
        """After the last step of this session, if nothing went wrong."""

    def state(self) -> dict[str, Any]:
        """What a later session has to know, as JSON."""

    def load(self, state: dict[str, Any]) -> None:
        """Take over the state of an earlier session."""


def train_loop(run: Run, callbacks: Sequence[Callback]) -> None:
    """Train the stage to its end, or until something asks to stop."""
    with run.closing:
        for callback in callbacks:
            callback.on_start(run)
        while not run.done and not run.stopping:
            begun = time.perf_counter()
            step = run.step + 1
            report = run.engine.train_step(run.batches(), run.rate(step), run.weight_decay(step))
            run.step += 1
            run.seconds += time.perf_counter() - begun
            for callback in callbacks:
                callback.on_step(run, report)
        for callback in callbacks:
            callback.on_end(run)
