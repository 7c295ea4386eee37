"""What happened to each stream between the ends of the stages: gaps after boundaries, worst cases, windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megacpt.evaluate.curves import Gap, stability_gap, windowed_forgetting, windowed_plasticity, worst_since
from megacpt.evaluate.forgetting import average
from megacpt.report.outcome import Outcome, curve
from megacpt.report.record import EvalPoint, RunRecord

WINDOWS = (8, 64, 512)  # steps


@dataclass(frozen=True)
class StreamGap:
    """What the boundary before a stage did to an older stream.

    Attributes:
        stage: number of the stage in the line, from 0.
        stream: the held-out stream.
        points: its measurements from the boundary to the end of the stage.
        gap: the stability gap, in bits a byte and steps.
        duration_tokens: duration of the gap in tokens.
    """

    stage: int
    stream: str
    points: tuple[EvalPoint, ...]
    gap: Gap
    duration_tokens: float


@dataclass(frozen=True)
class Worst:
    """The highest loss of a stream since it was learned, in bits a byte, and the tokens of the lineage at that time."""

    bits_per_byte: float
    tokens: int


@dataclass(frozen=True)
class Swing:
    """The largest rise (windowed forgetting) and fall (windowed plasticity) of a loss in a window, bits a byte."""

    rise: float
    fall: float


@dataclass(frozen=True)
class Measures:
    """What the curves of a line say beyond its matrix.

    Attributes:
        gaps: by boundary, then stream.
        worst: by stream.
        windows: by length in steps, then stream.
        worst_case: mean over the streams trained on of the worst loss since they were learned; of a stream that was
            not measured since, its newest loss (WC-ACC of De Lange et al. 2022 for losses).
    """

    gaps: tuple[StreamGap, ...]
    worst: Mapping[str, Worst]
    windows: Mapping[int, Mapping[str, Swing]]
    worst_case: float | None


def measures(line: Sequence[RunRecord], found: Outcome) -> Measures:
    """Measure a line of runs, the oldest first, of which `found` is the outcome."""
    gaps = [
        gap
        for stage in range(len(line))
        for stream in found.streams
        if found.homes.get(stream, stage) < stage and (gap := _gap(line, stage, stream)) is not None
    ]
    curves = {stream: curve(line, stream) for stream in found.streams}
    worst = {
        stream: high
        for stream, home in found.homes.items()
        if (high := _worst(curves[stream], _learned_at(line, home))) is not None
    }
    now = {stream: found.losses[-1].get(stream) for stream in found.homes}
    cases = {s: worst[s].bits_per_byte if s in worst else now[s] for s in found.homes}
    known = {stream: loss for stream, loss in cases.items() if loss is not None}
    windows = {window: _swings(curves, window) for window in WINDOWS}
    return Measures(tuple(gaps), worst, {w: swings for w, swings in windows.items() if swings}, average(known))


def _gap(line: Sequence[RunRecord], stage: int, stream: str) -> StreamGap | None:
    """The gap of a stream after the boundary before a stage; None where it was not measured there."""
    record = line[stage]
    points = list(record.evaluations.get(stream, ()))
    if points and points[0].tokens > record.start:
        earlier = line[stage - 1].evaluations.get(stream, ())[-1:] if stage else ()
        points = [*(point for point in earlier if point.tokens == record.start), *points]
    if not points or points[0].tokens != record.start:
        return None
    gap = stability_gap([point.step for point in points], [point.bits_per_byte for point in points])
    if gap is None:
        return None
    return StreamGap(stage, stream, tuple(points), gap, gap.duration * record.config.tokens_per_step)


def _learned_at(line: Sequence[RunRecord], home: int) -> int:
    """The step of the lineage at the end of a stage; -1 is what was before the line."""
    return line[0].steps_before if home < 0 else line[home].steps_before + line[home].ledger.stage.steps


def _worst(points: Sequence[EvalPoint], learned: int) -> Worst | None:
    high = worst_since([point.step for point in points], [point.bits_per_byte for point in points], learned)
    if high is None:
        return None
    loss, step = high
    return Worst(loss, next(point.tokens for point in points if point.step == step))


def _swings(curves: Mapping[str, Sequence[EvalPoint]], window: int) -> dict[str, Swing]:
    found = {}
    for stream, points in curves.items():
        apart = {point.step: point.bits_per_byte for point in points}  # a boundary may be measured on both its sides
        steps, losses = list(apart), list(apart.values())
        rise, fall = windowed_forgetting(steps, losses, window), windowed_plasticity(steps, losses, window)
        if rise is not None and fall is not None:
            found[stream] = Swing(rise, fall)
    return found


def notable(gap: Gap, least: float) -> bool:
    """Whether a gap is at least `least` deep; one of losses that are no numbers is."""
    return math.isnan(gap.depth) or gap.depth >= least
