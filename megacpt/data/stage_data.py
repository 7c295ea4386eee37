"""The samples of a stage: sample g is a pure function of (plan, g)."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from typing import Protocol

import numpy as np

from megacpt.data.mixture import MixturePattern
from megacpt.data.order import WindowOrder, derive_key
from megacpt.data.plan import Segment, Source, StagePlan
from megacpt.data.stream import TokenStream, Verify
from megacpt.data.tokenizer import Tokenizer
from megacpt.errors import DataError


@dataclass(frozen=True)
class Location:
    """Where a sample is: the index of its source in the plan, and where it begins in that stream."""

    source: int
    offset: int


class StageData:
    """The endless sequence of samples that a plan describes; opening reads no token.

    Raises DataError when a stream is missing or damaged, is another one than planned, was made with another
    tokenizer than `tokenizer` (when given), or is too short for one sample.
    """

    def __init__(self, plan: StagePlan, verify: Verify = "size", tokenizer: Tokenizer | None = None) -> None:
        self.plan = plan
        self._mixture = MixturePattern([source.weight for source in plan.sources])
        self.streams: list[TokenStream] = []
        self._draws: list[_Draw] = []
        for source in plan.sources:
            stream = TokenStream.open(source.path, verify, tokenizer)
            _require_content(source, stream)
            self.streams.append(stream)
            self._draws.append(_draw(plan, source, stream.tokens))

    def locate(self, g: int) -> Location:
        """Return where sample `g` of the stage (from 0) is."""
        source, ordinal = self._mixture.locate(g)
        return Location(source, self._draws[source].offset(ordinal))

    def tokens(self, g: int) -> np.ndarray:
        """Return sample `g`: ids [seq_length + 1] as int64, the inputs and, one further, the targets."""
        location = self.locate(g)
        return self.streams[location.source].read(location.offset, self.plan.seq_length + 1)

    def counts(self, g: int) -> tuple[int, ...]:
        """Return how many of the first `g` samples come from each source of the plan."""
        return self._mixture.counts(g)

    def sample_hash(self, g: int) -> str:
        """Return the identity of sample `g`: a SHA-256 over the stream's content hash, offset and length."""
        location = self.locate(g)
        stream = self.plan.sources[location.source].content_hash
        return sha256(f"{stream} {location.offset} {self.plan.seq_length}".encode()).hexdigest()


class _Draw(Protocol):
    def offset(self, ordinal: int) -> int:
        """Return the position in the stream of the first token of the source's sample `ordinal`."""
        ...


class _Stretch:
    """The samples of one segment, in their order."""

    def __init__(self, segment: Segment, source: Source, tokens: int) -> None:
        windows = (tokens - 1) // segment.seq_length
        if windows < 1:
            raise DataError(
                f"the stream {source.path} has {tokens:,} tokens, fewer than the {segment.seq_length + 1:,} "
                f"of one sample (seq_length {segment.seq_length:,} and its last target): use more text or a "
                "shorter seq_length"
            )
        self._segment = segment
        self._order = WindowOrder(windows, derive_key(segment.key, source.content_hash, segment.seq_length))

    def offset(self, ordinal: int) -> int:
        return self._order.window(self._segment.start + ordinal) * self._segment.seq_length


class _Seen:
    """Endless draws from consumed samples: each of them once, in a new order, before any a second time.

    What counts is the consumption: a window that the lineage consumed twice is two samples here. Samples that
    were longer than those of this stage are cut into as many whole ones as fit.
    """

    def __init__(self, plan: StagePlan, source: Source, tokens: int) -> None:
        consumed = [segment for segment in source.segments if segment.count]
        for segment in consumed:
            if segment.seq_length < plan.seq_length:
                raise DataError(
                    f"source {source.name}: its seen samples have seq_length {segment.seq_length:,}, this "
                    f"stage needs {plan.seq_length:,}: use the policy 'fresh', or a seq_length that is not "
                    "larger"
                )
        if not consumed:
            raise DataError(f"source {source.name}: seen replay has nothing to draw from, no sample of it was consumed")
        self._length = plan.seq_length
        self._stretches = [_Stretch(segment, source, tokens) for segment in consumed]
        self._cuts = [segment.seq_length // plan.seq_length for segment in consumed]
        sizes = [(segment.count or 0) * cuts for segment, cuts in zip(consumed, self._cuts, strict=True)]
        self._ends = list(accumulate(sizes))
        self._order = WindowOrder(self._ends[-1], derive_key(plan.key, source.content_hash, "seen"))

    def offset(self, ordinal: int) -> int:
        drawn = self._order.window(ordinal)
        which = bisect_right(self._ends, drawn)
        within = drawn - (self._ends[which - 1] if which else 0)
        sample, cut = divmod(within, self._cuts[which])
        return self._stretches[which].offset(sample) + cut * self._length


def _draw(plan: StagePlan, source: Source, tokens: int) -> _Draw:
    if source.policy == "seen":
        return _Seen(plan, source, tokens)
    segment = source.segments[0]
    if segment.seq_length != plan.seq_length:
        raise DataError(
            f"source {source.name}: its segment has seq_length {segment.seq_length}, the stage {plan.seq_length}"
        )
    return _Stretch(segment, source, tokens)


def _require_content(source: Source, stream: TokenStream) -> None:
    if stream.meta.content_hash != source.content_hash:
        raise DataError(
            f"the stream {source.path} is not the one of the plan: its content hash is "
            f"{stream.meta.content_hash[:16]}, the plan of this stage has {source.content_hash[:16]}; put "
            "the original stream back, or start another run"
        )
