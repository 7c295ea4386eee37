"""The plan of a stage's data: which stretches of which streams, in which shares; kept in the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from megacpt.errors import DataError

Role = Literal["new", "replay"]
Policy = Literal["seen", "fresh", "power_law", "reservoir", "external"]
Select = Literal["random", "best", "worst"]
Order = Literal["ascending", "descending", "cyclical"]
# Policies that draw from what the lineage has consumed; the others go on in an open segment.
DRAWN = ("seen", "power_law", "reservoir")
_POSSIBLE = {("new", None), *(("replay", policy) for policy in get_args(Policy))}
_Plain = TypeVar("_Plain", bound="Subset | Curriculum | Segment | Source | Phase | StagePlan")


@dataclass(frozen=True)
class Subset:
    """So many windows of a stream instead of all: drawn at random, or those of the best or worst score."""

    windows: int
    select: Select = "random"

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise DataError(f"a subset needs at least one window: {self}")


@dataclass(frozen=True)
class Curriculum:
    """Windows visited by score, in `parts` buckets (cyclical: in `parts` cycles), shuffled inside a bucket."""

    order: Order
    parts: int

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise DataError(f"a curriculum needs at least one part: {self}")


@dataclass(frozen=True)
class Segment:
    """Samples `start` to ``start + count`` of a stream's endless order under (`key`, `seq_length`).

    `count` None means open ended: as many as the stage takes. `subset` and `curriculum` say which windows the order
    visits, and by which score; None for all of them, shuffled.
    """

    key: int
    seq_length: int
    start: int
    count: int | None
    subset: Subset | None = None
    curriculum: Curriculum | None = None

    def __post_init__(self) -> None:
        if self.seq_length < 1 or self.start < 0 or (self.count is not None and self.count < 0):
            raise DataError(f"a segment needs seq_length >= 1, start >= 0 and count >= 0: {self}")


@dataclass(frozen=True)
class Source:
    """One stream of a stage.

    `content_hash` is that of the stream when the stage was planned. `role` "new" and the policies "fresh" and
    "external" read one open segment; the others draw only from `segments`, which the lineage has consumed. `weight` is
    a proportion of the stage's samples. `threshold` is for "reservoir": a consumed sample is in the reservoir if its
    keyed hash is below it.
    """

    name: str
    path: str
    content_hash: str
    role: Role
    policy: Policy | None
    weight: float
    segments: tuple[Segment, ...]
    threshold: int | None = None

    def __post_init__(self) -> None:
        if (self.role, self.policy) not in _POSSIBLE:
            raise DataError(f"source {self.name}: role {self.role!r} with policy {self.policy!r} is not possible")
        if (self.policy == "reservoir") != (self.threshold is not None):
            raise DataError(f"source {self.name}: a reservoir has a threshold, and nothing else has one")
        if self.policy in DRAWN:
            if any(segment.count is None for segment in self.segments):
                raise DataError(f"source {self.name}: {self.policy} replay needs segments with a count")
        elif len(self.segments) != 1 or self.segments[0].count is not None:
            raise DataError(f"source {self.name}: it needs exactly one segment without a count")


@dataclass(frozen=True)
class Phase:
    """From sample `start` of the stage on, each source has its part of `shares` (proportions, a number a source).

    Over the first `ramp` samples the shares go there in a straight line from those before; 0 for at once.
    """

    start: int
    shares: tuple[float, ...]
    ramp: int = 0

    def __post_init__(self) -> None:
        if self.start < 0 or self.ramp < 0:
            raise DataError(f"a phase needs start >= 0 and ramp >= 0: {self}")


@dataclass(frozen=True)
class StagePlan:
    """All sources of a stage, of samples of `seq_length` + 1 tokens; `key` draws from consumed samples.

    Without `phases` the weights of the sources hold throughout; with them, until the first phase starts.
    """

    seq_length: int
    key: int
    sources: tuple[Source, ...]
    phases: tuple[Phase, ...] = ()

    def __post_init__(self) -> None:
        starts = [phase.start for phase in self.phases]
        if starts != sorted(set(starts)) or any(len(phase.shares) != len(self.sources) for phase in self.phases):
            raise DataError(f"phases need rising starts, and a share for each of {len(self.sources)} sources")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> StagePlan:
        """Make the plan again from what `to_dict` returned; raise DataError for missing or unknown keys."""
        sources = tuple(_source(source) for source in content.get("sources", ()))
        phases = tuple(
            _make(Phase, {**phase, "shares": tuple(phase.get("shares", ()))}) for phase in content.get("phases", ())
        )
        return _make(cls, {**content, "sources": sources, "phases": phases})


def _source(content: Mapping[str, Any]) -> Source:
    return _make(Source, {**content, "segments": tuple(_segment(segment) for segment in content.get("segments", ()))})


def _segment(content: Mapping[str, Any]) -> Segment:
    parts: dict[str, type[Subset] | type[Curriculum]] = {"subset": Subset, "curriculum": Curriculum}
    made = {key: _make(kind, content[key]) for key, kind in parts.items() if content.get(key) is not None}
    return _make(Segment, {**content, **made})


def _make(kind: type[_Plain], content: Mapping[str, Any]) -> _Plain:
    wrong = sorted({field.name for field in fields(kind)} ^ content.keys())
    if wrong:
        raise DataError(f"the data plan has missing or unknown keys in {kind.__name__}: {', '.join(wrong)}")
    return kind(**content)
