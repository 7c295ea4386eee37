"""What the metrics of a run say of its experts; docs/routing-measures.md explains the numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

_TRAINED = re.compile(r"moe/layer-(\d+)/max_load")


@dataclass(frozen=True)
class RoutingPoint:
    """A measurement of the layers with experts.

    Attributes:
        step: optimizer steps of the stage up to then.
        tokens: tokens of the lineage up to then.
        layers: numbers of the layers, from 1.
        numbers: by measure, a number a layer; measures that were not taken are missing.
        experts: by measure, a number an expert for each layer; at both ends of a stage only.
    """

    step: int
    tokens: int
    layers: tuple[int, ...]
    numbers: Mapping[str, tuple[float, ...]]
    experts: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)

    def mean(self, measure: str) -> float | None:
        """The mean of a measure over the layers; None where it was not taken."""
        return fmean(self.numbers[measure]) if self.numbers.get(measure) else None


@dataclass(frozen=True)
class RoutingRecord:
    """Measurements of a run, oldest first; none for a dense model.

    Attributes:
        streams: by held-out stream.
        together: of all streams (the expert-domain information).
        training: of the logged optimizer steps (the imbalance of the global batch).
    """

    streams: Mapping[str, tuple[RoutingPoint, ...]] = field(default_factory=dict)
    together: tuple[RoutingPoint, ...] = ()
    training: tuple[RoutingPoint, ...] = ()

    def until(self, tokens: int) -> RoutingRecord:
        """What was measured up to `tokens` of the lineage."""

        def early(points: Iterable[RoutingPoint]) -> tuple[RoutingPoint, ...]:
            return tuple(point for point in points if point.tokens <= tokens)

        streams = {stream: early(points) for stream, points in self.streams.items()}
        return RoutingRecord(streams, early(self.together), early(self.training))


@dataclass
class RoutingLines:
    """Lines of metrics as they are read; a step that was made again after a crash counts once, as written last."""

    found: dict[tuple[str, str], dict[int, RoutingPoint]] = field(default_factory=dict)

    def add(self, line: Mapping[str, Any]) -> None:
        """Take over what a line says of routing, if it does; raise KeyError, TypeError or ValueError if damaged."""
        if line["kind"] == "train":
            numbers = {found[1]: value for key, value in line.items() if (found := _TRAINED.fullmatch(key))}
            layers, by_measure = list(numbers), {"max_load": list(numbers.values())}
        elif line["kind"] in ("routing", "information"):
            layers = line["layers"]
            by_measure = {name: values for name, values in line.items() if isinstance(values, list)}
            del by_measure["layers"]
            by_measure.pop("streams", None)
        else:
            return
        if layers:
            self._keep(line, [int(layer) for layer in layers], by_measure)

    def _keep(self, line: Mapping[str, Any], layers: list[int], by_measure: Mapping[str, list[Any]]) -> None:
        numbers, experts = {}, {}
        for name, values in by_measure.items():
            if len(values) != len(layers):
                raise ValueError(f"{name} has {len(values)} numbers for {len(layers)} layers")
            if name.startswith("expert_"):
                experts[name] = tuple(tuple(map(_number, row)) for row in values)
            else:
                numbers[name] = tuple(map(_number, values))
        point = RoutingPoint(int(line["step"]), int(line["lineage_tokens"]), tuple(layers), numbers, experts)
        self.found.setdefault((line["kind"], str(line.get("stream", ""))), {})[point.step] = point

    def record(self) -> RoutingRecord:
        """Everything in its order."""
        ordered = {key: tuple(points[step] for step in sorted(points)) for key, points in self.found.items()}
        streams = {stream: points for (kind, stream), points in ordered.items() if kind == "routing"}
        return RoutingRecord(streams, ordered.get(("information", ""), ()), ordered.get(("train", ""), ()))


def _number(value: float | None) -> float:
    """A number of a line, where null stands for one that has no meaning, as for an expert without tokens."""
    return math.nan if value is None else float(value)
