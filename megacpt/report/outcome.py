"""What came out of a line of runs: losses stage by stage, what was learned and forgotten, what was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megacpt.evaluate.forgetting import change, forgetting
from megacpt.report.record import EvalPoint, RunRecord


@dataclass(frozen=True)
class Outcome:
    """Losses of held-out streams along a line of runs, in bits a byte.

    Attributes:
        stages: names of the stages, oldest first.
        streams: names of the held-out streams, in the order in which they were trained on.
        homes: stage in which each stream was first trained on; streams that never were are missing.
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
        return (self.losses[home - 1] if home else self.start).get(stream)

    def own(self, stream: str) -> float | None:
        """The loss of a stream at the end of its own stage."""
        return None if stream not in self.homes else self.losses[self.homes[stream]].get(stream)


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
    return Outcome(
        tuple(record.name for record in line),
        streams,
        {name: home for name, home in homes.items() if name in streams},
        start,
        losses,
        forgetting(losses, homes),
        change(losses, homes),
    )


def curve(line: Sequence[RunRecord], stream: str) -> list[EvalPoint]:
    """The measurements of a held-out stream along a line of runs."""
    return [point for record in line for point in record.evaluations.get(stream, ())]


def readings(line: Sequence[RunRecord]) -> list[Reading]:
    """What a line of runs has read of each stream, in the order in which they came in."""
    stages = line[-1].ledger.stages
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
    """The first run of the line that trains on each stream, by the name of the stream."""
    homes: dict[str, int] = {}
    for number, record in enumerate(line):
        for source in record.ledger.stage.plan.sources:
            if source.role == "new":
                homes.setdefault(source.name, number)
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
