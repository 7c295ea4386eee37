"""Which windows of a stream a segment visits, and in which order: all or a subset, shuffled or by score.

Every order is endless: epoch e visits each of its windows once, at ordinals ``e * windows`` up to ``(e + 1) *
windows``, and arranges them anew. All of it is computed from keys; only what depends on scores reads a ranking from
disk (see `scores`).

- A random subset of K windows is the first K places of a keyed permutation of all windows: a larger subset holds a
  smaller one. The best or the worst K are the last or the first of the ranking (a high score is good).
- An ascending curriculum cuts its windows by rank into `parts` buckets of the same size, from the lowest scores to the
  highest, and shuffles inside each (Bengio et al., "Curriculum learning", ICML 2009). Descending is its mirror.
- A cyclical curriculum deals its windows to `parts` cycles: of every `parts` windows that follow each other in rank,
  each cycle gets one, which one a keyed rotation decides. A cycle visits its own in ascending order.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from megacpt.data.order import WindowOrder, derive_key
from megacpt.data.plan import Curriculum, Segment, Subset
from megacpt.data.scores import ranked_windows
from megacpt.data.stream import TokenStream
from megacpt.errors import DataError


class Visits(Protocol):
    """An endless order over `windows` windows."""

    windows: int

    def window_many(self, ordinals: np.ndarray) -> np.ndarray:
        """Return the windows [n] that stand at `ordinals` int64 [n] of the order."""
        ...


def visits(segment: Segment, content_hash: str, stream: TokenStream) -> Visits:
    """Return the order in which `segment` visits the windows of `stream`.

    Raises DataError when the stream is shorter than one sample, smaller than the subset, or lacks the scores.
    """
    windows, subset = (stream.tokens - 1) // segment.seq_length, segment.subset
    if windows < 1:
        raise DataError(
            f"the stream {stream.folder} has {stream.tokens:,} tokens, fewer than the {segment.seq_length + 1:,} "
            f"of one sample (seq_length {segment.seq_length:,} and its last target): use more text or a "
            "shorter seq_length"
        )
    if subset is not None and subset.windows > windows:
        raise DataError(
            f"the stream {stream.folder} has {windows:,} samples of seq_length {segment.seq_length:,}, fewer than the "
            f"{subset.windows:,} of its subset: take a smaller subset, or more text"
        )
    key = derive_key(segment.key, content_hash, segment.seq_length)
    everything = WindowOrder(windows, key)
    if segment.curriculum is not None:
        return _ByScore(_ranking(stream, segment.seq_length, subset, everything), segment.curriculum, key)
    if subset is None:
        return everything
    inside = WindowOrder(subset.windows, derive_key(key, "subset", subset.select))
    if subset.select == "random":
        return _RandomSubset(everything, inside)
    return _Chosen(_ranking(stream, segment.seq_length, subset, everything), inside)


def _ranking(stream: TokenStream, seq_length: int, subset: Subset | None, everything: WindowOrder) -> np.ndarray:
    """Return the windows that a segment visits, in the rising order of their scores."""
    if subset is None:
        return ranked_windows(stream, seq_length)
    if subset.select == "best":
        return ranked_windows(stream, seq_length)[-subset.windows :]
    if subset.select == "worst":
        return ranked_windows(stream, seq_length)[: subset.windows]
    first = np.arange(subset.windows)
    label = f"{subset.windows}-of-{everything.key:x}"
    return ranked_windows(stream, seq_length, label, lambda: everything.window_many(first))


class _RandomSubset:
    """The windows at the first places of `everything`, in the order of `inside`."""

    def __init__(self, everything: WindowOrder, inside: WindowOrder) -> None:
        self.windows = inside.windows
        self._everything, self._inside = everything, inside

    def window_many(self, ordinals: np.ndarray) -> np.ndarray:
        return self._everything.window_many(self._inside.window_many(ordinals))


class _Chosen:
    """The windows `chosen` [n], in the order of `inside`."""

    def __init__(self, chosen: np.ndarray, inside: WindowOrder) -> None:
        self.windows = inside.windows
        self._chosen, self._inside = chosen, inside

    def window_many(self, ordinals: np.ndarray) -> np.ndarray:
        return _at(self._chosen, self._inside.window_many(ordinals))


class _ByScore:
    """The windows `ranked` [n] by rising score, visited as `curriculum` says."""

    def __init__(self, ranked: np.ndarray, curriculum: Curriculum, key: int) -> None:
        self.windows = len(ranked)
        self._ranked, self._curriculum, self._key = ranked, curriculum, derive_key(key, "curriculum")

    def window_many(self, ordinals: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(ordinals, self.windows)
        if self._curriculum.order == "cyclical":
            return _at(self._ranked, self._dealt(epochs, places))
        ranks = self._bucketed(epochs, places)
        return _at(self._ranked, self.windows - 1 - ranks if self._curriculum.order == "descending" else ranks)

    def _bucketed(self, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the rank of each place: that of a place of the same bucket, in an order of its own."""
        parts = self._curriculum.parts
        buckets = ((places + 1) * parts - 1) // self.windows
        ranks = np.empty(len(places), np.int64)
        for bucket in np.unique(buckets):
            here = buckets == bucket
            low, high = int(bucket) * self.windows // parts, (int(bucket) + 1) * self.windows // parts
            order = WindowOrder(high - low, derive_key(self._key, int(bucket)))
            ranks[here] = low + order.window_many(epochs[here] * (high - low) + places[here] - low)
        return ranks

    def _dealt(self, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the rank of each place: which group of `parts` ranks its cycle is at, and which of the group it has.

        Where the windows do not divide by `parts`, the last group is smaller, and the first cycles are longer by one.
        """
        parts = self._curriculum.parts
        groups, rest = divmod(self.windows, parts)
        longer = rest * (groups + 1)
        cycles = np.where(places < longer, places // (groups + 1), rest + (places - longer) // max(groups, 1))
        group = places - cycles * groups - np.minimum(cycles, rest)
        size = np.where(group < groups, parts, rest)
        ranks: np.ndarray = group * parts + (cycles + self._rotation(epochs, group)) % size
        return ranks

    def _rotation(self, epochs: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Return a number from 0 to 2^31 - 1 that depends on the key, the epoch and the group."""
        mixed: np.ndarray = groups.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(self._key)
        for number in (epochs.astype(np.uint64), np.uint64(0)):
            mixed = (mixed ^ (mixed >> np.uint64(32)) ^ number) * np.uint64(0xD6E8FEB86659FD93)
        mixed >>= np.uint64(33)
        return mixed.astype(np.int64)


def _at(windows: np.ndarray, places: np.ndarray) -> np.ndarray:
    found: np.ndarray = windows[places].astype(np.int64)
    return found
