"""Which stream each sample of a stage comes from, when the shares change on the way.

A stage is a row of stretches: one at the weights of its sources, then for each phase the treads of its ramp and the
rest. In each stretch a `MixturePattern` runs, and begins with what the one before owes: that is less than a sample a
source, so that it stays so however often the shares change. A share of zero is exactly that: a source that leaves the
mixture hands on what it was owed.

A ramp is climbed in at most 32 treads of the same length, each at the share that the straight line has in its middle.
The weights of a tread make up for what rounding to 1/10,000 took or gave in those before it.

Stretches are found by bisection and woven when they are reached, so that the time and the memory that a sample
takes do not grow with the stage. What is known of a stage does not change when a phase is added behind it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise, zip_longest
from math import fsum
from typing import NamedTuple

import numpy as np

from megacpt.data.mixture import BLOCK, MixturePattern, whole_shares
from megacpt.data.plan import Phase

TREADS = 32


class _Stretch(NamedTuple):
    """Samples from `start` on, after `before` [sources] samples of each source."""

    start: int
    before: tuple[int, ...]
    pattern: MixturePattern


class Course:
    """The source of every sample of a stage: `weights` [sources] at first, then as the `phases` say.

    Raises DataError for weights or shares that are negative, not finite, or all zero.
    """

    def __init__(self, weights: Sequence[float], phases: Sequence[Phase] = ()) -> None:
        self._starts, self._weights = zip(*_spans(weights, phases), strict=True)
        for shares in self._weights:
            whole_shares(shares)
        self._stretches: list[_Stretch] = []

    def locate(self, g: int) -> tuple[int, int]:
        """Return the source of sample `g` of the stage, and its ordinal among the samples of that source."""
        stretch = self._stretch(g)
        source, ordinal = stretch.pattern.locate(g - stretch.start)
        return source, stretch.before[source] + ordinal

    def locate_many(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what `locate` does, for samples `g` int64 [n]: sources [n] and ordinals [n], both int64."""
        sources, ordinals = np.empty(len(g), np.int64), np.empty(len(g), np.int64)
        numbers = np.searchsorted(self._starts, g, side="right")
        for number in np.unique(numbers):
            here = numbers == number
            stretch = self._stretch(int(g[here][0]))
            found, nth = stretch.pattern.locate_many(g[here] - stretch.start)
            sources[here], ordinals[here] = found, np.array(stretch.before)[found] + nth
        return sources, ordinals

    def counts(self, g: int) -> tuple[int, ...]:
        """Return how many of the first `g` samples come from each source."""
        stretch = self._stretch(g)
        return _add(stretch.before, stretch.pattern.counts(g - stretch.start))

    def _stretch(self, g: int) -> _Stretch:
        """Return the stretch that sample `g` is in; weave it, and those before it, if it is the first time."""
        number = bisect_right(self._starts, g) - 1 if g >= 0 else 0
        while len(self._stretches) <= number:
            self._stretches.append(self._next_stretch())
        return self._stretches[number]

    def _next_stretch(self) -> _Stretch:
        number = len(self._stretches)
        start, weights = self._starts[number], self._weights[number]
        length = self._starts[number + 1] - start if number + 1 < len(self._starts) else None
        if not number:
            return _Stretch(start, (0,) * len(weights), MixturePattern(weights, length=length))
        last = self._stretches[-1]
        gone = start - last.start
        before = _add(last.before, last.pattern.counts(gone))
        return _Stretch(start, before, MixturePattern(weights, last.pattern.lags(gone), length))


def _spans(weights: Sequence[float], phases: Sequence[Phase]) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Yield the start and the weights of every stretch."""
    shares = _normed(weights)
    if not phases or phases[0].start > 0:
        yield 0, tuple(weights)
    for phase, following in zip_longest(phases, phases[1:]):
        end = following.start if following else None
        target = _normed(phase.shares)
        yield from _treads(phase, shares, target, end)
        reached = 1.0 if end is None or not phase.ramp else min(1.0, (end - phase.start) / phase.ramp)
        if end is None or end > phase.start + phase.ramp:
            yield phase.start + phase.ramp, phase.shares
        shares = _between(shares, target, reached)


def _treads(
    phase: Phase, shares: Sequence[float], target: Sequence[float], end: int | None
) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Yield the start and the weights of the treads of a ramp from `shares` to `target`, up to sample `end`."""
    treads = min(phase.ramp, TREADS)
    owed = [0.0] * len(shares)
    for low, high in pairwise(phase.ramp * tread // treads for tread in range(treads + 1 if treads else 0)):
        if end is not None and phase.start + low >= end:
            return
        length = high - low
        wanted = _between(shares, target, (low + high) / (2 * phase.ramp))
        # A source that had too much keeps a trace of its weight: it stays in the mixture, at the least share there is.
        raised = tuple(max(share / BLOCK, share + debt / length) for share, debt in zip(wanted, owed, strict=True))
        counts = whole_shares(raised)
        given = [length * count / sum(counts) for count in counts]
        owed = [debt + share * length - part for debt, share, part in zip(owed, wanted, given, strict=True)]
        yield phase.start + low, raised


def _normed(weights: Sequence[float]) -> tuple[float, ...]:
    whole_shares(weights)
    scaled = [weight / max(weights) for weight in weights]
    total = fsum(scaled)
    return tuple(weight / total for weight in scaled)


def _between(first: Sequence[float], last: Sequence[float], at: float) -> tuple[float, ...]:
    return tuple(a + (b - a) * at for a, b in zip(first, last, strict=True))


def _add(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(first, second, strict=True))
