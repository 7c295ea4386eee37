"""From the metrics of a run to the numbers that a recipe compares."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacpt.config import RunConfig, load_run
from megacpt.config.base import Interval
from megacpt.continuation.boundary import RUN
from megacpt.errors import DataError
from megacpt.recipes.execute import METRICS
from megacpt.recipes.recipe import Measure

Curve = list[tuple[int, float]]
"""Step and value, oldest first."""
_TRAINED = "training_max_load"


@dataclass(frozen=True)
class RunRecord:
    """What a run wrote down.

    Attributes:
        run: its folder.
        config: its configuration.
        curves: by measure and held-out stream; the stream of the batches of training is "".
    """

    run: Path
    config: RunConfig
    curves: dict[tuple[str, str], Curve]

    @classmethod
    def read(cls, run: Path) -> RunRecord:
        """Read the metrics of a run."""
        curves: dict[tuple[str, str], Curve] = {}
        for text in (run / METRICS).read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            for key, value in _values(line):
                curves.setdefault(key, []).append((line["step"], value))
        return cls(run, load_run(run / RUN), curves)

    def find(self, measure: Measure) -> float | None:
        """Return a measure, the mean over its streams; None where the run has not measured it."""
        values = []
        for stream in measure.streams or [""]:
            chosen = self._chosen(self.curves.get((measure.of, stream), []), measure)
            if not chosen:
                return None
            values.append(max(chosen))
        return statistics.fmean(values)

    def measured(self, measure: Measure) -> float:
        """Return a measure as `find`.

        Raises:
            DataError: the run has not measured it.
        """
        found = self.find(measure)
        if found is None:
            where = f" of {', '.join(measure.streams)}" if measure.streams else ""
            raise DataError(f"{self.run} has no {measure.of}{where} to take the {measure.when} from")
        return found

    def _chosen(self, curve: Curve, measure: Measure) -> list[float]:
        """Return the values whose highest is the measure; there is but one at the start and the end."""
        if measure.when == "end":
            return [value for _, value in curve[-1:]]
        if measure.when == "start":
            return [value for step, value in curve if step == 0]
        first, last = self._step(measure.after), self._step(measure.within)
        return [value for step, value in curve if step > (first or 0) and (last is None or step <= last)]

    def _step(self, place: Interval | None) -> int | None:
        return None if place is None else place.steps(self.config.stage.tokens, self.config.tokens_per_step)


def _values(line: dict[str, Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """The measures of a line, each with its name and stream; those of layers as their mean."""
    if line["kind"] == "eval":
        yield ("bits_per_byte", line["stream"]), line["bits_per_byte"]
    elif line["kind"] == "routing":
        for name in ("max_load", "saturation_start"):
            yield (name, line["stream"]), statistics.fmean(line[name])
    elif line["kind"] == "train":
        layers = [value for key, value in line.items() if key.startswith("moe/layer-") and key.endswith("/max_load")]
        if layers:
            yield (_TRAINED, ""), statistics.fmean(layers)
