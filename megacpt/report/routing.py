"""What the boundaries of a line of runs did to the routing of each held-out stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megacpt.report.record import RunRecord
from megacpt.report.routing_record import RoutingPoint

NEAR = 512  # steps after a boundary in which the worst imbalance is looked for


@dataclass(frozen=True)
class Level:
    """A measure of all layers: its mean, and the layer that is worst.

    Attributes:
        mean: over the layers.
        worst: of the worst layer.
        layer: its number.
    """

    mean: float
    worst: float
    layer: int


@dataclass(frozen=True)
class Shift:
    """What a stage did to the routing of a held-out stream.

    Attributes:
        stage: number of the stage in the line, from 0.
        stream: the held-out stream; ``None`` for the batches of training.
        before: maximum routing imbalance at the boundary; of training, in the last step logged before it.
        peak: the highest within `NEAR` steps after the boundary, by the mean over the layers.
        peak_step: steps from the boundary until then.
        end: the newest of the stage.
        kept: router saturation at the end against the boundary; None where nothing was kept to compare with.
        kept_home: the same against the end of the stream's own stage.
    """

    stage: int
    stream: str | None
    before: Level
    peak: Level
    peak_step: int
    end: Level
    kept: Level | None
    kept_home: Level | None


def even_load(record: RunRecord) -> float | None:
    """The imbalance of perfectly even routing, k/E; None for a dense model."""
    moe = record.config.model.moe
    return None if moe is None else moe.top_k / moe.experts


def shifts(line: Sequence[RunRecord]) -> tuple[Shift, ...]:
    """Measure each boundary of a line of runs, the oldest first; of a stage on a new model there is none."""
    found: list[Shift] = []
    for number, record in enumerate(line):
        if record.ledger.parent is None:
            continue
        earlier = line[number - 1].routing.training[-1:] if number else ()
        for stream, points in ((None, (*earlier, *record.routing.training)), *record.routing.streams.items()):
            if len(points) > 1 and points[0].tokens <= record.start:
                found.append(_shift(number, stream, points))
    return tuple(found)


def _shift(stage: int, stream: str | None, points: Sequence[RoutingPoint]) -> Shift:
    before, after, end = points[0], points[1:], points[-1]
    near = [point for point in after if point.step <= NEAR] or list(after[:1])
    peak = max(near, key=lambda point: _known(point.mean("max_load")))
    return Shift(
        stage,
        stream,
        _level(before, "max_load"),
        _level(peak, "max_load"),
        peak.step,
        _level(end, "max_load"),
        _level(end, "saturation_start") if "saturation_start" in end.numbers else None,
        _level(end, "saturation_home") if "saturation_home" in end.numbers else None,
    )


def _level(point: RoutingPoint, measure: str) -> Level:
    """The worst layer is the most loaded one, or that whose choices changed most."""
    sign = 1 if measure == "max_load" else -1
    pairs = list(zip(point.numbers[measure], point.layers, strict=True))
    worst, layer = max(pairs, key=lambda pair: _known(sign * pair[0]))
    return Level(point.mean(measure) or 0.0, worst, layer)


def _known(value: float | None) -> float:
    """The number to compare by: one that is none is below all others."""
    return -math.inf if value is None or math.isnan(value) else value


def timeline(record: RunRecord, stream: str) -> list[RoutingPoint]:
    """The measurements of a stream in a stage on a scale of doublings: at steps 0, 1, 2, 4, ... and the newest.

    The first measurement since a doubling stands for it, so that a stage of any length has few.
    """
    points = record.routing.streams.get(stream, ())
    first: dict[int, int] = {}
    for number, point in enumerate(points):
        first.setdefault(point.step.bit_length(), number)
    return [point for number, point in enumerate(points) if number in (*first.values(), len(points) - 1)]


def routing_document(line: Sequence[RunRecord], found: Sequence[Shift]) -> dict[str, Any] | None:
    """What there is to say of the experts of a line, as JSON; None for dense models."""
    if not any(record.routing.streams or record.routing.training for record in line):
        return None
    streams = dict.fromkeys(stream for record in line for stream in record.routing.streams)
    return {
        "even": even_load(line[-1]),
        "shifts": [_shift_document(shift) for shift in found],
        "held_out": {
            stream: [_point_document(p) for record in line for p in record.routing.streams.get(stream, ())]
            for stream in streams
        },
        "information": [_point_document(point) for record in line for point in record.routing.together],
        "training": [[p.tokens, *p.numbers["max_load"]] for record in line for p in record.routing.training],
    }


def _shift_document(shift: Shift) -> dict[str, Any]:
    levels = {key: None if level is None else vars(level) for key, level in _levels(shift)}
    return {"stage": shift.stage, "stream": shift.stream, "peak_step": shift.peak_step, **levels}


def _levels(shift: Shift) -> list[tuple[str, Level | None]]:
    return [(key, getattr(shift, key)) for key in ("before", "peak", "end", "kept", "kept_home")]


def _point_document(point: RoutingPoint) -> dict[str, Any]:
    where = {"step": point.step, "tokens": point.tokens, "layers": list(point.layers)}
    return {**where, **{name: list(values) for name, values in (*point.numbers.items(), *point.experts.items())}}
