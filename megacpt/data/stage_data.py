"""The samples of a stage: sample g is a pure function of (plan, g)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np

from megacpt.data.course import Course
from megacpt.data.draws import Draw, draw
from megacpt.data.plan import Phase, Source, StagePlan
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
    tokenizer than `tokenizer` (when given), is too short for one sample or for its subset, or lacks the scores that
    its subset or curriculum goes by.
    """

    def __init__(self, plan: StagePlan, verify: Verify = "size", tokenizer: Tokenizer | None = None) -> None:
        self.plan = plan
        self._course = _course(plan)
        self.streams: list[TokenStream] = []
        self._draws: list[Draw] = []
        for source in plan.sources:
            stream = TokenStream.open(source.path, verify, tokenizer)
            _require_content(source, stream)
            self.streams.append(stream)
            self._draws.append(draw(plan, source, stream))

    def with_phases(self, phases: tuple[Phase, ...]) -> StageData:
        """Return the data of the same plan with other `phases`, on the streams that are open already.

        A phase that is added behind the others leaves all samples before its start as they are.
        """
        changed = object.__new__(StageData)
        changed.plan = replace(self.plan, phases=phases)
        changed._course = _course(changed.plan)
        changed.streams, changed._draws = self.streams, self._draws
        return changed

    def locate(self, g: int) -> Location:
        """Return where sample `g` of the stage (from 0) is."""
        source, ordinal = self._course.locate(g)
        return Location(source, int(self._draws[source].offset_many(np.array([ordinal]))[0]))

    def locate_many(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what `locate` does, for samples `g` int64 [n]: sources [n] and offsets [n], both int64."""
        sources, ordinals = self._course.locate_many(g)
        offsets = np.empty(len(g), np.int64)
        for source in np.unique(sources):
            here = sources == source
            offsets[here] = self._draws[source].offset_many(ordinals[here])
        return sources, offsets

    def tokens(self, g: int) -> np.ndarray:
        """Return sample `g`: ids [seq_length + 1] as int64, the inputs and, one further, the targets."""
        location = self.locate(g)
        return self.streams[location.source].read(location.offset, self.plan.seq_length + 1)

    def batch(self, first: int, count: int) -> np.ndarray:
        """Return samples `first` up to ``first + count``: ids [count, seq_length + 1] as int64."""
        return self.gather(np.arange(first, first + count))

    def gather(self, g: np.ndarray) -> np.ndarray:
        """Return samples `g` int64 [n], one below the other: ids [n, seq_length + 1] as int64."""
        sources, offsets = self.locate_many(g)
        ids = np.empty((len(g), self.plan.seq_length + 1), np.int64)
        for source in np.unique(sources):
            here = np.flatnonzero(sources == source)
            self.streams[source].indexed.read_into(ids, here, offsets[here])
        return ids

    def counts(self, g: int) -> tuple[int, ...]:
        """Return how many of the first `g` samples come from each source of the plan."""
        return self._course.counts(g)

    def distinct(self, source: int) -> int:
        """Return how many different samples source number `source` of the plan has: those of one epoch of it."""
        return self._draws[source].distinct

    def sample_hash(self, g: int) -> str:
        """Return the identity of sample `g`: a SHA-256 over the stream's content hash, offset and length."""
        location = self.locate(g)
        stream = self.plan.sources[location.source].content_hash
        return sha256(f"{stream} {location.offset} {self.plan.seq_length}".encode()).hexdigest()


def _course(plan: StagePlan) -> Course:
    return Course([source.weight for source in plan.sources], plan.phases)


def _require_content(source: Source, stream: TokenStream) -> None:
    if stream.meta.content_hash != source.content_hash:
        raise DataError(
            f"the stream {source.path} is not the one of the plan: its content hash is "
            f"{stream.meta.content_hash[:16]}, the plan of this stage has {source.content_hash[:16]}; put "
            "the original stream back, or start another run"
        )
