"""A run folder as the report sees it: what was set, what was read, and how the losses went."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from megacpt.checkpoint.store import checkpoints
from megacpt.config import RunConfig
from megacpt.config import load_run as load_config
from megacpt.continuation.boundary import RUN, started
from megacpt.continuation.ledger import Ledger
from megacpt.errors import CheckpointError
from megacpt.report.routing_record import RoutingLines, RoutingRecord

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class TrainPoint:
    """A logged optimizer step.

    Attributes:
        tokens: tokens of the lineage up to the end of the step.
        loss: nats a token.
        rate: learning rate.
        tokens_per_second: throughput since the step logged before.
    """

    tokens: int
    loss: float
    rate: float
    tokens_per_second: float


@dataclass(frozen=True)
class EvalPoint:
    """A measurement of a held-out stream.

    Attributes:
        step: optimizer steps of the lineage up to then.
        tokens: tokens of the lineage up to then.
        bits_per_byte: loss in bits a byte of UTF-8 text.
    """

    step: int
    tokens: int
    bits_per_byte: float


@dataclass(frozen=True)
class RunRecord:
    """A run: one stage of a lineage.

    Attributes:
        folder: the run folder.
        config: the run as resolved.
        ledger: of the newest checkpoint; of the start where there is none yet.
        train: logged steps, oldest first.
        evaluations: measurements by held-out stream, oldest first.
        unreadable: lines in the midst of the metrics that could not be read.
        routing: what was measured of experts.
    """

    folder: Path
    config: RunConfig
    ledger: Ledger
    train: tuple[TrainPoint, ...]
    evaluations: Mapping[str, tuple[EvalPoint, ...]]
    unreadable: int = 0
    routing: RoutingRecord = field(default_factory=RoutingRecord)

    @property
    def name(self) -> str:
        """The name of the stage."""
        return self.ledger.stage.name

    @property
    def start(self) -> int:
        """Tokens of the lineage before the stage."""
        return self.ledger.tokens - self.ledger.stage.tokens

    @property
    def steps_before(self) -> int:
        """Optimizer steps of the lineage before the stage."""
        return sum(stage.steps for stage in self.ledger.stages[:-1])

    @property
    def end(self) -> int:
        """Tokens of the lineage at the newest that is known of the run: a checkpoint or a line of metrics."""
        trained = [point.tokens for point in self.train[-1:]]
        measured = [point.tokens for points in self.evaluations.values() for point in points[-1:]]
        return max(self.ledger.tokens, *trained, *measured, self.start)

    @property
    def complete(self) -> bool:
        """Whether the stage reached the end that its configuration sets."""
        return self.end - self.start >= self.config.stage.tokens

    @property
    def speed(self) -> float | None:
        """Tokens a second: the median over the logged steps."""
        speeds = [point.tokens_per_second for point in self.train if math.isfinite(point.tokens_per_second)]
        return median(speeds) if speeds else None

    @property
    def ended(self) -> float | None:
        """The training loss at the end, in nats a token: the mean over the last 50th of the logged steps."""
        return fmean(point.loss for point in self.train[-max(1, len(self.train) // 50) :]) if self.train else None

    @property
    def wall_seconds(self) -> float:
        """Wall time of the stage up to its newest checkpoint."""
        return self.ledger.stage.seconds


def load_run(folder: Path) -> RunRecord:
    """Read a run folder, also that of a run that is going on or was killed.

    Raises:
        CheckpointError: the folder holds no run, or a damaged ledger.
        ConfigError: its run.yaml is damaged.
    """
    start = started(folder)
    if start is None:
        raise CheckpointError(f"{folder} holds no run: a run folder has start.json, {RUN} and {METRICS} in it")
    newest = checkpoints(folder)
    ledger = Ledger.read(newest[-1]) if newest else start
    metrics = _read_metrics(folder / METRICS, sum(stage.steps for stage in start.stages[:-1]))
    return RunRecord(
        folder,
        load_config(folder / RUN),
        ledger,
        metrics.train_points(),
        metrics.eval_points(),
        metrics.unreadable,
        metrics.routing.record(),
    )


@dataclass
class _Metrics:
    """The lines of a metrics file by step: a step that was made again after a crash counts once, as written last.

    `before` is the number of steps of the lineage before those of the file.
    """

    before: int
    train: dict[int, TrainPoint] = field(default_factory=dict)
    evaluations: dict[str, dict[int, EvalPoint]] = field(default_factory=dict)
    unreadable: int = 0
    routing: RoutingLines = field(default_factory=RoutingLines)

    def add(self, line: Mapping[str, Any]) -> None:
        """Take over a line; raise KeyError, TypeError or ValueError where it is none."""
        kind, step, tokens = line["kind"], int(line["step"]), int(line["lineage_tokens"])
        if kind == "train":
            speed = float(line.get("tokens_per_second", math.nan))
            self.train[step] = TrainPoint(tokens, float(line["loss"]), float(line["rate"]), speed)
        elif kind == "eval":
            points = self.evaluations.setdefault(str(line["stream"]), {})
            points[step] = EvalPoint(self.before + step, tokens, float(line["bits_per_byte"]))
        self.routing.add(line)

    def train_points(self) -> tuple[TrainPoint, ...]:
        return tuple(self.train[step] for step in sorted(self.train))

    def eval_points(self) -> dict[str, tuple[EvalPoint, ...]]:
        return {name: tuple(points[step] for step in sorted(points)) for name, points in self.evaluations.items()}


def _read_metrics(path: Path, before: int) -> _Metrics:
    """Read a metrics file; a kill may have cut off its last line, which is passed over."""
    found = _Metrics(before)
    if not path.is_file():
        return found
    *lines, rest = path.read_bytes().split(b"\n")
    for line in lines:
        try:
            found.add(json.loads(line))
        except (ValueError, KeyError, TypeError):
            found.unreadable += 1
    with suppress(ValueError, KeyError, TypeError):  # empty, or half a line
        found.add(json.loads(rest))
    return found
