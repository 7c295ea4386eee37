"""Two results of one benchmark side by side: what became faster or slower by more than the noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megacpt.bench.result import BenchResult, Interval, ratio
from megacpt.errors import DataError


@dataclass(frozen=True)
class Change:
    """How one series changed from A to B.

    Attributes:
        name: of the series.
        before: median of A, seconds.
        after: median of B, seconds.
        ratio: B over A, with its noise.
    """

    name: str
    before: float
    after: float
    ratio: Interval

    @property
    def verdict(self) -> Literal["faster", "slower", "within noise"]:
        """What can be said about B."""
        if not self.ratio.certain:
            return "within noise"
        return "faster" if self.ratio.value < 1 else "slower"


@dataclass(frozen=True)
class Comparison:
    """The changes, and whatever else differs between the two results, as (key, in A, in B)."""

    changes: list[Change]
    differences: list[tuple[str, str, str]]


def compare(before: BenchResult, after: BenchResult) -> Comparison:
    """Compare two results.

    Raises:
        DataError: they are of different benchmarks, or have nothing in common.
    """
    if before.bench != after.bench:
        raise DataError(f"the results are of different benchmarks: {before.bench} and {after.bench}")
    shared = [name for name in before.series if name in after.series]
    if not shared:
        raise DataError(f"the results share no series: {', '.join(before.series)} and {', '.join(after.series)}")
    changes = []
    for name in shared:
        old, new = before.series[name], after.series[name]
        changes.append(Change(name, old.median, new.median, ratio(new, old, paired=False)))
    parts = [
        dict(_flat(result.config)) | dict(_flat(result.machine.model_dump(exclude={"load"}), "machine."))
        for result in (before, after)
    ]
    keys = sorted(parts[0].keys() | parts[1].keys())
    pairs = [(key, parts[0].get(key, "-"), parts[1].get(key, "-")) for key in keys]
    return Comparison(changes, [pair for pair in pairs if pair[1] != pair[2]])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
