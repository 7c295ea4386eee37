"""The plan of a stage's data: which stretches of which streams, in which shares; kept in the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

from megacpt.errors import DataError

Role = Literal["new", "replay"]
Policy = Literal["seen", "fresh"]
_Plain = TypeVar("_Plain", bound="Segment | Source | StagePlan")


@dataclass(frozen=True)
class Segment:
    """Samples `start` to ``start + count`` of a stream's endless order under (`key`, `seq_length`).

    `count` None means open ended: as many as the stage takes.
    """

    key: int
    seq_length: int
    start: int
    count: int | None

    def __post_init__(self) -> None:
        if self.seq_length < 1 or self.start < 0 or (self.count is not None and self.count < 0):
            raise DataError(f"a segment needs seq_length >= 1, start >= 0 and count >= 0: {self}")


@dataclass(frozen=True)
class Source:
    """One stream of a stage.

    `content_hash` is that of the stream when the stage was planned. `role` "new" and `policy` "fresh" read
    one open segment; `policy` "seen" draws only from its `segments`, which the lineage has consumed. `weight`
    is a proportion of the stage's samples.
    """

    name: str
    path: str
    content_hash: str
    role: Role
    policy: Policy | None
    weight: float
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if (self.role, self.policy) not in {("new", None), ("replay", "seen"), ("replay", "fresh")}:
            raise DataError(f"source {self.name}: role {self.role!r} with policy {self.policy!r} is not possible")
        if self.policy == "seen":
            if any(segment.count is None for segment in self.segments):
                raise DataError(f"source {self.name}: seen replay needs segments with a count")
        elif len(self.segments) != 1 or self.segments[0].count is not None:
            raise DataError(f"source {self.name}: it needs exactly one segment without a count")


@dataclass(frozen=True)
class StagePlan:
    """All sources of a stage, of samples of `seq_length` + 1 tokens; `key` draws from seen samples."""

    seq_length: int
    key: int
    sources: tuple[Source, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> StagePlan:
        """Make the plan again from what `to_dict` returned; raise DataError for missing or unknown keys."""
        sources = tuple(
            _make(
                Source,
                {
                    **source,
                    "segments": tuple(_make(Segment, segment) for segment in source.get("segments", ())),
                },
            )
            for source in content.get("sources", ())
        )
        return _make(cls, {**content, "sources": sources})


def _make(kind: type[_Plain], content: Mapping[str, Any]) -> _Plain:
    wrong = sorted({field.name for field in fields(kind)} ^ content.keys())
    if wrong:
        raise DataError(f"the data plan has missing or unknown keys in {kind.__name__}: {', '.join(wrong)}")
    return kind(**content)
