"""The tokens of a stage counted again, sample by sample, from its plan and the streams on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, isclose
from pathlib import Path

import numpy as np

from megacpt.continuation.ledger import StageRecord
from megacpt.data.plan import DRAWN, StagePlan
from megacpt.data.stage_data import StageData
from megacpt.data.visits import visits

_CHUNK = 1 << 16
# So many counters of visited places are kept for one source; a finer division of a larger stream is not followed.
_MOST = 1 << 32
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Claim:
    """What a ledger says of a stage, and where that ledger is."""

    record: StageRecord
    where: str

    @property
    def samples(self) -> int:
        """Samples that the stage had read."""
        return self.record.steps * self.record.batch


@dataclass(frozen=True)
class SharedStage:
    """A stage with all that ledgers claim of it, at one moment or several; the claim of the most steps comes last."""

    claims: tuple[Claim, ...]

    @property
    def plan(self) -> StagePlan:
        """The plan as last known; a controller changes only what comes after."""
        return self.claims[-1].record.plan

    @property
    def work(self) -> int:
        """How many samples a recount looks at."""
        drawn = (source for source in self.plan.sources if source.policy in DRAWN)
        return self.claims[-1].samples + sum(s.count or 0 for source in drawn for s in source.segments)


def share_stages(claims: Iterable[Claim]) -> list[SharedStage]:
    """Put together what is claimed of the same stage; equal claims of several ledgers count once."""
    groups: dict[str, list[list[Claim]]] = {}
    known: set[str] = set()
    for claim in sorted(claims, key=lambda claim: -claim.record.steps):
        content = repr(claim.record.content())
        if content in known:
            continue
        known.add(content)
        rows = groups.setdefault(repr(claim.record.identity()), [])
        row = next((row for row in rows if _begins(claim, row[0])), None)
        if row is None:
            rows.append([claim])
        else:
            row.append(claim)
    return [SharedStage(tuple(reversed(row))) for rows in groups.values() for row in rows]


def _begins(earlier: Claim, later: Claim) -> bool:
    """Whether the samples of a claim are the first ones of another of the same stage: the same phases until then."""
    begun = [[p for p in claim.record.plan.phases if p.start < earlier.samples] for claim in (earlier, later)]
    return begun[0] == begun[1]


def relocated(plan: StagePlan, places: Mapping[str, Path]) -> StagePlan:
    """Return a plan with its streams at `places` (by content hash)."""
    sources = (replace(s, path=str(places.get(s.content_hash, s.path))) for s in plan.sources)
    return replace(plan, sources=tuple(sources))


def recount(stage: SharedStage, places: Mapping[str, Path], quick: bool, advance: Advance) -> Iterator[str]:
    """Count the samples of a stage again, and yield what does not agree with the ledgers.

    Args:
        stage: what is claimed.
        places: where the streams are, by content hash.
        quick: compute the counts from the shares, and locate no sample. Otherwise every sample is located: it is in
            its stream, none comes twice in an epoch, and replay of consumed samples takes only those.
        advance: told how many samples have been looked at since it was last told.

    Raises:
        DataError: if a stream is missing or does not fit the plan.
    """
    data = StageData(relocated(stage.plan, places))
    walk = None if quick else _Walk(data, advance)
    for claim in stage.claims:
        counts = data.counts(claim.samples) if walk is None else walk.counts(claim.samples)
        distinct = [data.distinct(i) for i in range(len(counts))]
        yield from _disagreements(claim, counts, distinct)
    if walk is not None:
        name, where = stage.claims[-1].record.name, stage.claims[-1].where
        yield from (f"{where}: stage {name}: {text}" for text in walk.problems())


def _disagreements(claim: Claim, counts: Sequence[int], distinct: Sequence[int]) -> Iterator[str]:
    record, begin = claim.record, f"{claim.where}: stage {claim.record.name}"
    length = record.plan.seq_length
    if record.tokens != (read := sum(counts) * length):
        yield f"{begin} claims {record.tokens:,} tokens, and its samples have {read:,}"
    names = [source.name for source in record.plan.sources]
    for name in sorted(record.consumed.keys() - set(names)):
        yield f"{begin} claims tokens of {name}, which its plan does not have"
    for name, count, whole in zip(names, counts, distinct, strict=True):
        said = record.consumed.get(name, 0)
        if said != count * length:
            yield f"{begin} claims {said:,} tokens of {name}, and its samples have {count * length:,}"
        times = record.repeats.get(name, 0.0)
        if not isclose(times, count / whole, rel_tol=1e-9, abs_tol=1e-12):
            yield f"{begin} claims {times:.6g} epochs of {name}, and its samples make {count / whole:.6g}"


class _Walk:
    """Every sample of a stage, one after the other."""

    def __init__(self, data: StageData, advance: Advance) -> None:
        self._data, self._advance = data, advance
        self._counts = np.zeros(len(data.plan.sources), np.int64)
        self._at = 0
        self._visited = [_Visited(data, number, advance) for number in range(len(data.plan.sources))]

    def counts(self, samples: int) -> tuple[int, ...]:
        """Go on to sample `samples`, and return how many came from each source."""
        while self._at < samples:
            end = min(samples, self._at + _CHUNK)
            sources, offsets = self._data.locate_many(np.arange(self._at, end))
            self._counts += np.bincount(sources, minlength=len(self._counts))
            for source in np.unique(sources):
                self._visited[source].add(offsets[sources == source])
            self._advance(end - self._at)
            self._at = end
        return tuple(map(int, self._counts))

    def problems(self) -> Iterator[str]:
        """Yield what was wrong with the samples of each source."""
        for source, visited in zip(self._data.plan.sources, self._visited, strict=True):
            yield from (f"{count:,} samples of {source.name} {what}" for what, count in visited.wrong.items() if count)


class _Visited:
    """How often each place of a stream was visited in the current epoch of a source, and how often it may be.

    A place is `unit` tokens, the greatest common divisor of the sample lengths in use. An open segment may visit a
    window once an epoch; draws from consumed samples may visit one as often as the lineage had consumed it.
    """

    def __init__(self, data: StageData, number: int, advance: Advance) -> None:
        source, stream = data.plan.sources[number], data.streams[number]
        self._length, self._tokens = data.plan.seq_length, stream.tokens
        self._epoch = self._left = data.distinct(number)
        self.wrong = {"are not inside their stream": 0, "come twice in an epoch": 0, "were never consumed": 0}
        segments = [segment for segment in source.segments if segment.count or segment.count is None]
        self._unit = gcd(self._length, *(segment.seq_length for segment in segments))
        size = self._tokens // self._unit + 1
        self._seen = np.zeros(size if size < _MOST else 0, np.uint16)
        self._allowed: np.ndarray | None = None
        if source.policy not in DRAWN:
            self._left -= segments[0].start % self._epoch
        elif len(self._seen):
            self._allowed = np.zeros(size, np.uint16)
            for segment in segments:
                order = visits(segment, source.content_hash, stream)
                self._allow(order.window_many, segment.start, segment.count or 0, segment.seq_length, advance)

    def _allow(
        self, windows: Callable[[np.ndarray], np.ndarray], start: int, count: int, length: int, advance: Advance
    ) -> None:
        """Allow the samples of `length` at `count` places of an order, cut to the length of the stage's."""
        assert self._allowed is not None
        for at in range(start, start + count, _CHUNK):
            ordinals = np.arange(at, min(at + _CHUNK, start + count))
            offsets = windows(ordinals) * length
            for cut in range(length // self._length):
                np.add.at(self._allowed, (offsets + cut * self._length) // self._unit, 1)
            advance(len(ordinals))

    def add(self, offsets: np.ndarray) -> None:
        """Take note of the source's next samples, which begin at `offsets` [n]."""
        inside = (offsets >= 0) & (offsets + self._length < self._tokens) & (offsets % self._unit == 0)
        self.wrong["are not inside their stream"] += int(np.count_nonzero(~inside))
        if not len(self._seen):
            return
        places = np.where(inside, offsets, 0) // self._unit
        while len(places):
            now, valid = places[: self._left], inside[: self._left]
            np.add.at(self._seen, now[valid], 1)
            self._compare(now[valid])
            places, inside = places[self._left :], inside[self._left :]
            self._left -= len(now)
            if not self._left:
                self._seen[:] = 0
                self._left = self._epoch

    def _compare(self, places: np.ndarray) -> None:
        seen = self._seen[places]
        if self._allowed is None:
            self.wrong["come twice in an epoch"] += int(np.count_nonzero(seen > 1))
            return
        allowed = self._allowed[places]
        self.wrong["were never consumed"] += int(np.count_nonzero(allowed == 0))
        self.wrong["come twice in an epoch"] += int(np.count_nonzero((seen > allowed) & (allowed > 0)))
