"""The mixture of a line of stages as it changed with the tokens: which stream had which share when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megacpt.continuation.ledger import StageRecord
from megacpt.data.plan import StagePlan

Shares = tuple[float, ...]


@dataclass(frozen=True)
class Mixture:
    """The shares of the sources in a stage. Between two points they change in a straight line.

    Attributes:
        stage: name of the stage.
        start: tokens of the lineage before it.
        streams: name of each source's stream, whatever it is called as replay.
        replayed: whether the source is replay.
        points: tokens of the lineage and shares, which sum to 1; a jump is two points at one place.
        phases: whether the plan changes the shares during the stage.
    """

    stage: str
    start: int
    streams: tuple[str, ...]
    replayed: tuple[bool, ...]
    points: tuple[tuple[int, Shares], ...]
    phases: bool


def mixtures(stages: Sequence[StageRecord]) -> list[Mixture]:
    """The mixture of each stage that read something, the oldest first."""
    names: dict[str, str] = {}
    found, start = [], 0
    for stage in stages:
        for source in stage.plan.sources:
            names.setdefault(source.content_hash, source.name.removeprefix("replay-"))
        if stage.tokens and stage.plan.sources:
            points = plan_shares(stage.plan, stage.tokens // stage.plan.seq_length)
            found.append(
                Mixture(
                    stage.name,
                    start,
                    tuple(names[source.content_hash] for source in stage.plan.sources),
                    tuple(source.role == "replay" for source in stage.plan.sources),
                    tuple((start + sample * stage.plan.seq_length, shares) for sample, shares in points),
                    any(phase.start * stage.plan.seq_length < stage.tokens for phase in stage.plan.phases),
                )
            )
        start += stage.tokens
    return found


def plan_shares(plan: StagePlan, samples: int) -> list[tuple[int, Shares]]:
    """Return the corners of the shares over the first `samples` of a stage, as sample and shares, first and last in.

    A ramp that the next phase interrupts ends where that begins, with the shares that it had come to.
    """
    points = [(0, _normal([source.weight for source in plan.sources]))]
    ends = [*(phase.start for phase in plan.phases[1:]), samples]
    for phase, end in zip(plan.phases, ends, strict=False):
        if phase.start >= samples:
            break
        before, after = points[-1][1], _normal(phase.shares)
        stop = min(phase.start + phase.ramp, end, samples)
        points.append((phase.start, before))
        points.append((stop, _between(before, after, (stop - phase.start) / phase.ramp if phase.ramp else 1.0)))
    points.append((samples, points[-1][1]))
    return list(dict.fromkeys(points))


def _normal(weights: Sequence[float]) -> Shares:
    whole = sum(weights)
    return tuple(weight / whole for weight in weights)


def _between(a: Shares, b: Shares, part: float) -> Shares:
    return tuple(x + part * (y - x) for x, y in zip(a, b, strict=True))
