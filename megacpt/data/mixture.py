"""Which stream each sample comes from, at shares that do not change: exact, and computed in constant time.

Weights become whole numbers of samples a block (largest remainder). Inside a block the sources are
interleaved by Tijdeman's algorithm for the chairman assignment problem (R. Tijdeman, Discrete Mathematics 32,
1980): after any number of samples, no source is a whole sample away from its share.

A pattern may begin with *lags*: what an earlier pattern owes each source, in parts of a sample. They decide who comes
first, so that nothing adds up where shares change (see `course`). A source gets a sample only when at least
``1 / (2k - 2)`` of one is due to it; so none is ever a whole sample ahead of its share, whatever it began with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from itertools import islice
from math import floor, fsum, gcd, isfinite
from typing import NamedTuple

import numpy as np

from megacpt.errors import DataError

BLOCK = 10_000
"""Samples over which shares are exact; a weight is met to within 1/BLOCK."""
LAG = 1 << 20
"""Lags are counted in parts of a sample, so many a sample."""


class MixturePattern:
    """An endless sequence of sources in which each has its share.

    `weights` are proportions (they need not sum to one); a source of weight 0 never appears, and a source of
    positive weight, however small, always does. `lags` [sources] are what is owed to each at the beginning, in
    1/LAG samples (negative: it had more than its share); what those of weight 0 are owed passes to the others. With a
    `length`, only so many samples can be located.
    """

    def __init__(self, weights: Sequence[float], lags: Sequence[int] | None = None, length: int | None = None) -> None:
        self.block_counts: tuple[int, ...] = whole_shares(weights)
        self.block: int = sum(self.block_counts)
        self._lags = _settled(lags or [0] * len(weights), self.block_counts)
        self._length = length

    @property
    def _woven(self) -> _Woven:
        # Only the last patterns are kept in memory; a stage with many phases has many.
        return _interleave(self.block_counts, self._lags, self._length)

    def locate(self, g: int) -> tuple[int, int]:
        """Return the source of sample `g`, and its ordinal among the samples of that source."""
        repeats, at = self._place(g)
        woven = self._woven
        source = int(woven.sources[at])
        return source, repeats * int(woven.period[source]) + int(woven.ranks[at])

    def locate_many(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what `locate` does, for samples `g` int64 [n]: sources [n] and ordinals [n], both int64."""
        woven = self._woven
        repeats = np.maximum(g - woven.head, 0) // max(len(woven.sources) - woven.head, 1)
        at = g - repeats * (len(woven.sources) - woven.head)
        sources = woven.sources[at].astype(np.int64)
        return sources, repeats * woven.period[sources] + woven.ranks[at]

    def counts(self, g: int) -> tuple[int, ...]:
        """Return how many of the first `g` samples come from each source."""
        repeats, at = self._place(g)
        woven = self._woven
        partial = np.bincount(woven.sources[:at], minlength=len(self.block_counts))
        return tuple(repeats * int(whole) + int(part) for whole, part in zip(woven.period, partial, strict=True))

    def lags(self, g: int) -> tuple[int, ...]:
        """Return what is owed to each source after `g` samples, in 1/LAG samples."""
        found = zip(self._lags, self.block_counts, self.counts(g), strict=True)
        return tuple(lag + LAG * share * g // self.block - LAG * count for lag, share, count in found)

    def _place(self, g: int) -> tuple[int, int]:
        """Return how often the repeated part was passed before sample `g`, and the position of `g` without that."""
        if g < 0:
            raise ValueError(f"samples are counted from 0, not {g}")
        woven = self._woven
        length = len(woven.sources) - woven.head
        repeats = max(g - woven.head, 0) // max(length, 1)
        return repeats, g - repeats * length


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Round `weights` to samples a block by largest remainder, then make the block as short as it gets.

    Raises DataError for weights that are no proportions, and for more sources than samples in a block.
    """
    if not weights or not all(isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise DataError(f"mixture weights must be finite, not negative and not all zero: {list(weights)}")
    if sum(weight > 0 for weight in weights) > BLOCK:
        raise DataError(f"a mixture can hold at most {BLOCK} streams, this one has {len(weights)}")
    # Scaling by the largest weight first keeps the sum finite for weights of any size.
    scaled = [weight / max(weights) for weight in weights]
    total = fsum(scaled)
    exact = [weight / total * BLOCK for weight in scaled]
    counts = [max(floor(share), int(weight > 0)) for share, weight in zip(exact, weights, strict=True)]
    positive = [i for i, weight in enumerate(weights) if weight > 0]
    while sum(counts) < BLOCK:
        counts[max(positive, key=lambda i: exact[i] - counts[i])] += 1
    while sum(counts) > BLOCK:
        counts[max((i for i in positive if counts[i] > 1), key=lambda i: counts[i] - exact[i])] -= 1
    shortest = gcd(*counts)
    return tuple(count // shortest for count in counts)


def _settled(lags: Sequence[int], counts: tuple[int, ...]) -> tuple[int, ...]:
    """Return `lags` that sum to zero over the sources that appear, and are zero for the others."""
    owed = [lag if count else 0 for lag, count in zip(lags, counts, strict=True)]
    surplus, block = sum(owed), sum(counts)
    settled = [lag - surplus * count // block for lag, count in zip(owed, counts, strict=True)]
    settled[max(range(len(counts)), key=counts.__getitem__)] -= sum(settled)
    return tuple(settled)


class _Woven(NamedTuple):
    """A sequence of sources of which all but the first `head` samples are repeated for ever.

    `ranks` [samples] says how many earlier samples have the same source, `period` [sources] how many samples of each
    the repeated part has.
    """

    sources: np.ndarray
    ranks: np.ndarray
    head: int
    period: np.ndarray


@lru_cache(maxsize=32)
def _interleave(counts: tuple[int, ...], lags: tuple[int, ...], length: int | None) -> _Woven:
    """Weave blocks until one ends as an earlier one did (without lags: after the first), or up to `length` samples."""
    block, order = sum(counts), _in_turn(counts, lags)
    chosen: list[int] = []
    # What each source has had beyond its share, at the end of so many samples. Lags are bounded, and change by whole
    # samples from block to block, so that one of these comes back.
    ends: dict[tuple[int, ...], int] = {}
    beyond = (0,) * len(counts)
    while beyond not in ends and (length is None or len(chosen) < length):
        ends[beyond] = len(chosen)
        drawn = list(islice(order, block if length is None else min(block, length - len(chosen))))
        chosen += drawn
        had = np.bincount(drawn, minlength=len(counts)).tolist()
        beyond = tuple(before + n - whole for before, n, whole in zip(beyond, had, counts, strict=True))
    head = ends.get(beyond, len(chosen))
    sources, ranks = np.array(chosen, dtype=np.int32), np.empty(len(chosen), dtype=np.int32)
    for source in set(chosen):
        places = np.flatnonzero(sources == source)
        ranks[places] = np.arange(len(places))
    return _Woven(sources, ranks, head, np.bincount(sources[head:], minlength=len(counts)))


def _in_turn(counts: tuple[int, ...], lags: tuple[int, ...]) -> Iterator[int]:
    """Yield the sources one after another, for ever.

    With k sources of shares s and lags l, sample n (from 1) goes to the source that must appear soonest among those
    with ``l + n * s - taken >= 1 / (2k - 2)``: the one with the smallest ``(taken + 1 - 1 / (2k - 2) - l) / s``.
    Everything is multiplied out to whole numbers, so that every machine weaves the same pattern.
    """
    active = [i for i, count in enumerate(counts) if count]
    if len(active) == 1:
        while True:
            yield active[0]
    block, slack = sum(counts), 2 * len(active) - 2
    taken = [0] * len(counts)
    waiting: defaultdict[int, list[int]] = defaultdict(list)
    ready: list[tuple[float, int]] = []
    for i in active:
        waiting[max(0, _release(counts[i], lags[i], 0, block, slack))].append(i)
    position = 0
    while True:
        for i in waiting.pop(position, ()):
            due = LAG * (slack * taken[i] + slack - 1) - slack * lags[i]
            heappush(ready, (block * due / (LAG * counts[i]), i))
        _, chosen = heappop(ready)
        yield chosen
        taken[chosen] += 1
        position += 1
        release = _release(counts[chosen], lags[chosen], taken[chosen], block, slack)
        waiting[max(position, release)].append(chosen)


def _release(share: int, lag: int, taken: int, block: int, slack: int) -> int:
    """Return the position (from 0) from which on a source may appear for the time after `taken`."""
    needed = block * (LAG + slack * (LAG * taken - lag))
    return -(-needed // (LAG * slack * share)) - 1
