"""From the metrics of a run to the numbers that a recipe compares."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from megacpt.config import RunConfig, load_run
from megacpt.continuation.boundary import RUN
from megacpt.errors import DataError
from megacpt.recipes.execute import METRICS
from megacpt.recipes.recipe import Measure

Curve = list[tuple[int, float]]
"""Step and bits a byte, oldest first."""


def curves(run: Path) -> dict[str, Curve]:
    """Return the held-out losses of a run by stream."""
    found: dict[str, Curve] = {}
    for text in (run / METRICS).read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["kind"] == "eval":
            found.setdefault(line["stream"], []).append((line["step"], line["bits_per_byte"]))
    return found


def measured(run: Path, measure: Measure) -> float:
    """Return a measure of a run, in bits a byte: the mean over its streams.

    Raises:
        DataError: if the run has no evaluation that it needs.
    """
    found, config = curves(run), load_run(run / RUN)
    values = []
    for stream in measure.streams:
        chosen = _chosen(found.get(stream, []), measure, config)
        if not chosen:
            raise DataError(f"{run} has no evaluation of {stream} to take its {measure.when} from")
        values.append(max(chosen))
    return statistics.fmean(values)


def _chosen(curve: Curve, measure: Measure, config: RunConfig) -> list[float]:
    """Return the losses whose highest is the measure; there is but one at the start and the end."""
    if measure.when == "end":
        return [loss for _, loss in curve[-1:]]
    if measure.when == "start":
        return [loss for step, loss in curve if step == 0]
    last = None if measure.within is None else measure.within.steps(config.stage.tokens, config.tokens_per_step)
    return [loss for step, loss in curve if step > 0 and (last is None or step <= last)]
