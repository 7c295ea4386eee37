"""Where the samples of one source begin in its stream: what a stage reads, and what it draws from the past.

An open segment goes through its order. `seen` and `power_law` draw from all consumed samples of the source,
`reservoir` from those of them that are in the reservoir (see `reservoir`): each of them once, in a new order, before
any a second time. What counts is the consumption: a window that the lineage consumed twice is two samples here. Samples
that were longer than those of the stage are cut into as many whole ones as fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np

from megacpt.data.order import WindowOrder, derive_key
from megacpt.data.plan import DRAWN, Segment, Source, StagePlan
from megacpt.data.reservoir import reservoir_ordinals
from megacpt.data.stream import TokenStream
from megacpt.data.visits import visits
from megacpt.errors import DataError


class Draw(Protocol):
    """The endless samples of a source; each epoch gives its `distinct` ones once."""

    distinct: int

    def offset_many(self, ordinals: np.ndarray) -> np.ndarray:
        """Return the positions in the stream [n] at which the source's samples `ordinals` int64 [n] begin."""
        ...


def draw(plan: StagePlan, source: Source, stream: TokenStream) -> Draw:
    """Return the samples of `source`; raise DataError when it has none of the stage's length."""
    if source.policy in DRAWN:
        return _Consumed(plan, source, stream)
    segment = source.segments[0]
    if segment.seq_length != plan.seq_length:
        raise DataError(
            f"source {source.name}: its segment has seq_length {segment.seq_length}, the stage {plan.seq_length}"
        )
    return _Stretch(segment, source, stream)


class _Stretch:
    """The samples of one segment, in their order."""

    def __init__(self, segment: Segment, source: Source, stream: TokenStream) -> None:
        self._segment = segment
        self._visits = visits(segment, source.content_hash, stream)
        self.distinct = self._visits.windows

    def offset_many(self, ordinals: np.ndarray) -> np.ndarray:
        return self._visits.window_many(self._segment.start + ordinals) * self._segment.seq_length


class _Consumed:
    """Endless draws from consumed samples."""

    def __init__(self, plan: StagePlan, source: Source, stream: TokenStream) -> None:
        segments = [segment for segment in source.segments if segment.count]
        _require_length(plan, source, segments)
        self._length = plan.seq_length
        self._stretches = [_Stretch(segment, source, stream) for segment in segments]
        self._cuts = np.array([segment.seq_length // plan.seq_length for segment in segments], np.int64)
        self._kept: list[np.ndarray] | None = None
        counts = [segment.count or 0 for segment in segments]
        if source.threshold is not None:
            self._kept = [reservoir_ordinals(source.content_hash, segment, source.threshold) for segment in segments]
            counts = [len(kept) for kept in self._kept]
        if not any(counts):
            raise DataError(
                f"source {source.name}: {source.policy} replay has nothing to draw from, no sample of it "
                + ("is in the reservoir" if any(segment.count for segment in segments) else "was consumed")
            )
        sizes = [count * int(cuts) for count, cuts in zip(counts, self._cuts, strict=True)]
        self._starts = np.array([0, *accumulate(sizes)][:-1])
        self._ends = np.array(list(accumulate(sizes)))
        self.distinct = sum(sizes)
        self._order = WindowOrder(self.distinct, derive_key(plan.key, source.content_hash, "seen"))

    def offset_many(self, ordinals: np.ndarray) -> np.ndarray:
        drawn = self._order.window_many(ordinals)
        which = np.searchsorted(self._ends, drawn, side="right")
        samples, cuts = np.divmod(drawn - self._starts[which], self._cuts[which])
        offsets = cuts * self._length
        for number in np.unique(which):
            here = which == number
            nth = samples[here] if self._kept is None else self._kept[number][samples[here]]
            offsets[here] += self._stretches[number].offset_many(nth)
        return offsets


def _require_length(plan: StagePlan, source: Source, segments: Sequence[Segment]) -> None:
    for segment in segments:
        if segment.seq_length < plan.seq_length:
            raise DataError(
                f"source {source.name}: its {source.policy} samples have seq_length {segment.seq_length:,}, this "
                f"stage needs {plan.seq_length:,}: use the policy 'fresh', or a seq_length that is not "
                "larger"
            )
