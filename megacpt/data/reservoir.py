"""The reservoir: a uniform sample of everything that a lineage has consumed, of a fixed size in tokens.

Every consumed sample has a hash, and those of the smallest hashes are in the reservoir ("bottom-k" sampling; it has
the distribution of Vitter's Algorithm R, ACM TOMS 11, 1985). So a reservoir needs no memory of its own: it follows
from the ledger. As the lineage goes on, a sample enters at its own turn or never, and leaves only when others displace
it; a larger reservoir holds a smaller one.

The hash of sample `ordinal` of an order is output `ordinal` of the generator SplitMix64 (Steele, Lea and Flood, OOPSLA
2014), seeded by a key over the stream's content and the order: its key, sample length, subset and curriculum. The
order's key is the seed of the lineage, which all its stages share; a stage adds nothing to it. The hash
therefore stays the same over the whole lineage. Within an order no two hashes are equal, as the generator's
outputs are a permutation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from megacpt.data.order import derive_key
from megacpt.data.plan import Segment
from megacpt.errors import DataError

EVERYTHING = 1 << 64
"""The threshold below which every hash is."""
_CHUNK = 1 << 18
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def reservoir_threshold(consumed: Mapping[str, Sequence[Segment]], tokens: int) -> int:
    """Return the threshold of a reservoir of at most `tokens`: the samples with a hash below it are inside.

    `consumed` are the segments (each with its count) that the lineage has consumed, by the content hash of their
    stream. The threshold is the hash of the first sample that does not fit, or `EVERYTHING`. Time grows with the
    samples consumed, memory with the size of the reservoir.

    Raises DataError when nothing was consumed, or the reservoir has no room for one sample.
    """
    total = sum((s.count or 0) * s.seq_length for segments in consumed.values() for s in segments)
    if not total:
        raise DataError("a reservoir needs consumed samples: the lineage has none")
    if total <= tokens:
        return EVERYTHING
    # The hashes are uniform: looking a little further than the expected threshold is almost always enough.
    limit = min(EVERYTHING, EVERYTHING * tokens // total * 9 // 8 + EVERYTHING // 4096)
    while True:
        hashes, lengths = _below(consumed, limit)
        outside = np.flatnonzero(np.cumsum(lengths) > tokens)
        if len(outside):
            break
        limit = min(EVERYTHING, 2 * limit)
    if outside[0] == 0:
        raise DataError(f"a reservoir of {tokens:,} tokens has no room for a sample of {int(lengths[0]):,}: enlarge it")
    return int(hashes[outside[0]])


def reservoir_ordinals(content_hash: str, segment: Segment, threshold: int) -> np.ndarray:
    """Return which samples of a consumed `segment` are in the reservoir: int64 [n], rising, from 0 at its start."""
    chunks = [at + np.flatnonzero(_is_below(hashes, threshold)) for at, hashes in _hashes(content_hash, segment)]
    return np.concatenate(chunks) if chunks else np.empty(0, np.int64)


def reservoir_tokens(content_hash: str, segments: Sequence[Segment], threshold: int) -> int:
    """Return how many tokens of the consumed `segments` of a stream are in the reservoir."""
    return sum(s.seq_length * len(reservoir_ordinals(content_hash, s, threshold)) for s in segments)


def _below(consumed: Mapping[str, Sequence[Segment]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes below `limit`, rising, and the tokens of their samples."""
    hashes, lengths = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for content_hash, segments in consumed.items():
        for segment in segments:
            for _, found in _hashes(content_hash, segment):
                hashes.append(found[_is_below(found, limit)])
                lengths.append(np.full(len(hashes[-1]), segment.seq_length))
    order = np.argsort(np.concatenate(hashes), kind="stable")
    return np.concatenate(hashes)[order], np.concatenate(lengths)[order]


def _is_below(hashes: np.ndarray, threshold: int) -> np.ndarray:
    return hashes <= np.uint64(threshold - 1) if threshold > 0 else np.zeros(len(hashes), bool)


def _hashes(content_hash: str, segment: Segment) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the hashes of the segment's samples in chunks, each with the number of its first sample."""
    visits = (str(asdict(part)) if part else "" for part in (segment.subset, segment.curriculum))
    seed = np.uint64(derive_key("reservoir", segment.key, content_hash, segment.seq_length, *visits))
    for at in range(0, segment.count or 0, _CHUNK):
        first, count = segment.start + at, min(_CHUNK, (segment.count or 0) - at)
        mixed = np.arange(first + 1, first + count + 1, dtype=np.uint64)
        mixed *= _GOLDEN
        mixed += seed
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed ^= mixed >> np.uint64(shift)
            mixed *= np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        yield at, mixed
