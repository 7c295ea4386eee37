"""What came out of a line of runs: losses stage by stage, what was learned and forgotten, what was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megacpt.continuation.ledger import StageRecord
from megacpt.evaluate.forgetting import average_loss, change, forgetting, forward_transfer, learned
from megacpt.report.record import EvalPoint, RunRecord


@dataclass(frozen=True)
class Outcome:
    """Losses of held-out streams along a line of runs, in bits a byte.

    Attributes:
        stages: names of the stages, oldest first.
        streams: names of the held-out streams, in the order in which they were trained on.
        homes: stage in which each stream was first trained on, -1 for before the line; streams that never were are
            missing.
        start: losses before the first step of the line.
        losses: losses after each stage.
        forgotten: forgetting after each stage.
        changed: change since the end of the own stage, after each stage.
    """

    stages: tuple[str, ...]
    streams: tuple[str, ...]
    homes: dict[str, int]
    start: dict[str, float]
    losses: list[dict[str, float]]
    forgotten: list[dict[str, float]]
    changed: list[dict[str, float]]

    def before(self, stream: str) -> float | None:
        """The loss of a stream before its own stage."""
        home = self.homes.get(stream, 0)
        return None if home < 0 else self.after(home - 1).get(stream)

    def own(self, stream: str) -> float | None:
        """The loss of a stream at the end of its own stage."""
        return None if stream not in self.homes else self.after(self.homes[stream]).get(stream)

    def after(self, stage: int) -> dict[str, float]:
        """The losses after a stage; -1 for the start."""
        return self.losses[stage] if stage >= 0 else self.start

    @property
    def brought(self) -> dict[str, int]:
        """The homes of the streams that stages of the line brought in."""
        return {stream: home for stream, home in self.homes.items() if home >= 0}

    @property
    def learned(self) -> dict[str, float]:
        """What each stream gained in its own stage."""
        return learned(self.losses, self.brought, self.start)

    @property
    def forward(self) -> dict[str, float]:
        """What earlier stages gained on each stream before its own."""
        return forward_transfer(self.losses, self.brought, self.start)

    @property
    def averages(self) -> list[float | None]:
        """Mean loss of the streams trained on so far, after each stage."""
        return average_loss(self.losses, self.homes)


@dataclass(frozen=True)
class Reading:
    """How much of a stream a line of runs has read.

    Attributes:
        name: of the stream.
        tokens: tokens read in each stage, 0 where it was no part of it.
        shares: those tokens as a part of the stage.
        replayed: whether a stage read it as replay.
        passes: how many times the stream was read through, over all stages.
    """

    name: str
    tokens: tuple[int, ...]
    shares: tuple[float, ...]
    replayed: tuple[bool, ...]
    passes: float


def outcome(line: Sequence[RunRecord]) -> Outcome:
    """Summarise a line of runs, the oldest first."""
    homes = _homes(line)
    names = dict.fromkeys(name for record in line for name in record.evaluations)
    streams = tuple(sorted(names, key=lambda name: homes.get(name, len(line))))
    losses = [
        {name: value for name in streams if (value := _after(line, stage, name)) is not None}
        for stage in range(len(line))
    ]
    first = line[0]
    start = {
        name: points[0].bits_per_byte
        for name, points in first.evaluations.items()
        if points and points[0].tokens == first.start
    }
    rows, row_homes = [start, *losses], {name: home + 1 for name, home in homes.items()}
    return Outcome(
        tuple(record.name for record in line),
        streams,
        {name: home for name, home in homes.items() if name in streams},
        start,
        losses,
        forgetting(rows, row_homes)[1:],
        change(rows, row_homes)[1:],
    )


def curve(line: Sequence[RunRecord], stream: str) -> list[EvalPoint]:
    """The measurements of a held-out stream along a line of runs."""
    return [point for record in line for point in record.evaluations.get(stream, ())]


def read_stages(line: Sequence[RunRecord]) -> list[StageRecord]:
    """The stages of a line that read something, also those whose runs are not at hand; no converted model did."""
    return [stage for stage in line[-1].ledger.stages if stage.kind != "converted"]


def readings(line: Sequence[RunRecord]) -> list[Reading]:
    """What a line of runs has read of each stream, in the order in which they came in."""
    stages = read_stages(line)
    names: dict[str, str] = {}  # a stream is known by its content, whatever it is called as replay
    for stage in stages:
        for source in stage.plan.sources:
            names.setdefault(source.content_hash, source.name)
    found = []
    for content, name in names.items():
        tokens, replayed, passes = [], [], 0.0
        for stage in stages:
            sources = [source for source in stage.plan.sources if source.content_hash == content]
            tokens.append(sum(stage.consumed.get(source.name, 0) for source in sources))
            replayed.append(any(source.role == "replay" for source in sources))
            passes += sum(stage.repeats.get(source.name, 0.0) for source in sources)
        shares = tuple(n / max(stage.tokens, 1) for n, stage in zip(tokens, stages, strict=True))
        found.append(Reading(name, tuple(tokens), shares, tuple(replayed), passes))
    return found


def _homes(line: Sequence[RunRecord]) -> dict[str, int]:
    """The first run of the line that trains on each stream, by the name of the stream.

    It is -1 for streams of earlier stages, whose runs are not in the line, and for those that stand in for what the
    model was trained on before it came here: replay from outside.
    """
    before = line[0].ledger.stages[:-1]
    homes = {source.name: -1 for stage in before for source in stage.plan.sources if source.role == "new"}
    for number, record in enumerate(line):
        for source in record.ledger.stage.plan.sources:
            if source.role == "new":
                homes.setdefault(source.name, number)
            elif source.policy == "external":
                homes[source.name.removeprefix("replay-")] = -1
    return homes


def _after(line: Sequence[RunRecord], stage: int, stream: str) -> float | None:
    """The loss of a stream after a stage: as measured last in it, or else before the first step of the next one."""
    points = line[stage].evaluations.get(stream, ())
    if points:
        return points[-1].bits_per_byte
    if stage + 1 < len(line):
        later = line[stage + 1].evaluations.get(stream, ())
        if later and later[0].tokens == line[stage + 1].start:
            return later[0].bits_per_byte
    return None
