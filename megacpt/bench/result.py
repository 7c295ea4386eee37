"""The result of a benchmark: raw times and what they were measured on, as JSON."""

from __future__ import annotations

import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from megacpt.bench.machine import Machine
from megacpt.config.base import Section
from megacpt.data.files import write_bytes
from megacpt.errors import DataError

_RESAMPLES = 4000


class Interval(Section):
    """A figure and the interval that holds 95 % of its bootstrap resamples (Efron 1979)."""

    value: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether a ratio differs from 1 by more than the noise."""
        return not self.low <= 1.0 <= self.high


class Series(Section):
    """The times of one thing that was measured again and again.

    Attributes:
        blocks: seconds; times within a block were taken one after the other, and block i of one series next to block
            i of the others.
        work: what one time covers, such as tokens, for a rate.
        unit: the unit of `work`.
    """

    blocks: list[list[float]] = Field(min_length=1)
    work: float = 1.0
    unit: str = "step"

    @property
    def times(self) -> list[float]:
        """All times, in seconds."""
        return [time for block in self.blocks for time in block]

    @property
    def median(self) -> float:
        """The median time, in seconds."""
        return statistics.median(self.times)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The times that a quarter of all lie below and above, in seconds."""
        low, high = np.quantile(self.times, [0.25, 0.75])
        return float(low), float(high)


class BenchResult(Section):
    """A benchmark's result.

    Attributes:
        format: the version of this form.
        bench: which benchmark.
        created: date and time, UTC.
        machine: what it ran on.
        config: what was measured, every setting.
        series: the times by name.
        figures: what follows from them, by name.
    """

    format: Literal[1] = 1
    bench: str
    created: str = Field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    machine: Machine
    config: dict[str, Any]
    series: dict[str, Series]
    figures: dict[str, Interval | float] = Field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the result as JSON."""
        write_bytes(path, (self.model_dump_json(indent=2) + "\n").encode())


def read_result(path: Path) -> BenchResult:
    """Read what `BenchResult.write` wrote.

    Raises:
        DataError: there is no such file, or it is something else.
    """
    try:
        return BenchResult.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path} is not a result of `megacpt bench`: {where}: {first['msg']}") from error


def ratio(series: Series, base: Series, paired: bool) -> Interval:
    """The ratio of the median times of two series, and how far noise moves it.

    Args:
        series: the numerator.
        base: the denominator.
        paired: block i of both was measured at the same time, so that they are drawn together.
    """
    draw = np.random.default_rng(0)
    ours, theirs = ([np.asarray(block) for block in s.blocks] for s in (series, base))
    count = min(len(ours), len(theirs)) if paired else 0
    values = []
    for _ in range(_RESAMPLES):
        first = draw.integers(0, count or len(ours), count or len(ours))
        second = first if paired else draw.integers(0, len(theirs), len(theirs))
        top, bottom = (
            np.concatenate([blocks[i] for i in picked]) for blocks, picked in ((ours, first), (theirs, second))
        )
        values.append(np.median(top) / np.median(bottom))
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(value=series.median / base.median, low=float(low), high=float(high))
