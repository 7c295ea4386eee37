"""Which stream each sample of a stage comes from: exact shares, computed in constant time.

Weights become whole numbers of samples a block (largest remainder). Inside a block the sources are
interleaved by Tijdeman's algorithm for the chairman assignment problem (R. Tijdeman, Discrete Mathematics 32,
1980): after any number of samples, no source is a whole sample away from its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import floor, fsum, gcd, isfinite

import numpy as np

from megacpt.errors import DataError

BLOCK = 10_000
"""Samples over which shares are exact; a weight is met to within 1/BLOCK."""


class MixturePattern:
    """An endless sequence of sources in which each has its share.

    `weights` are proportions (they need not sum to one); a source of weight 0 never appears, and a source of
    positive weight, however small, always does.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.block_counts: tuple[int, ...] = _whole_shares(weights)
        self.block: int = sum(self.block_counts)
        self._sources, self._ranks = _interleave(self.block_counts)

    def locate(self, g: int) -> tuple[int, int]:
        """Return the source of sample `g` of the stage, and its ordinal among the samples of that source."""
        if g < 0:
            raise ValueError(f"samples are counted from 0, not {g}")
        blocks, position = divmod(g, self.block)
        source = int(self._sources[position])
        return source, blocks * self.block_counts[source] + int(self._ranks[position])

    def counts(self, g: int) -> tuple[int, ...]:
        """Return how many of the first `g` samples come from each source."""
        if g < 0:
            raise ValueError(f"samples are counted from 0, not {g}")
        blocks, position = divmod(g, self.block)
        partial = np.bincount(self._sources[:position], minlength=len(self.block_counts))
        return tuple(blocks * whole + int(part) for whole, part in zip(self.block_counts, partial, strict=True))


def _whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Round `weights` to samples a block by largest remainder, then make the block as short as it gets."""
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


@lru_cache(maxsize=32)
def _interleave(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each position of a block, its source and how many earlier positions hold the same source.

    With k sources and shares s, position n goes to the source that must appear soonest among those with
    ``n * s - taken >= 1 / (2k - 2)``: the one with the smallest ``(taken + 1 - 1 / (2k - 2)) / s``.
    Everything is multiplied out to whole numbers, so that every machine builds the same pattern.
    """
    block = sum(counts)
    active = np.array([i for i, count in enumerate(counts) if count], dtype=np.int64)
    if len(active) == 1:
        return np.full(block, active[0], dtype=np.int32), np.arange(block, dtype=np.int32)
    share = np.array([counts[i] for i in active], dtype=np.int64)
    slack = 2 * len(active) - 2
    taken = np.zeros(len(active), dtype=np.int64)
    sources, ranks = np.empty(block, dtype=np.int32), np.empty(block, dtype=np.int32)
    for position in range(block):
        lag = slack * (share * (position + 1) - block * taken)
        deadline = ((slack - 1) * block + slack * block * taken) / share
        chosen = int(np.argmin(np.where(lag >= block, deadline, np.inf)))
        sources[position], ranks[position] = active[chosen], taken[chosen]
        taken[chosen] += 1
    return sources, ranks
