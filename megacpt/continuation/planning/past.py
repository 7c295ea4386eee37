"""What a lineage has consumed of each stream, and where it goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from megacpt.config import RunConfig
from megacpt.continuation.ledger import Ledger
from megacpt.data.plan import Segment


@dataclass(frozen=True)
class PastStream:
    """What a lineage has consumed of one stream.

    Attributes:
        name: what it was called first, without `replay-` before it.
        path: where it was last.
        segments: the stretches of samples, oldest first; replay of consumed samples adds none.
        tokens: consumed tokens by stage, oldest stage first; replayed ones count like others.
    """

    name: str
    path: str
    segments: tuple[Segment, ...]
    tokens: tuple[int, ...]


Past = Mapping[str, PastStream]
"""The streams of a lineage by content hash, in the order in which they were first read."""


def lineage_seed(config: RunConfig, ledger: Ledger | None) -> int:
    """Return the seed that orders the data of a lineage: that of the first stage that was trained."""
    trained = [] if ledger is None else [stage for stage in ledger.stages if stage.kind != "converted"]
    return trained[0].seed if trained else config.seed


def before_stage(start: Ledger) -> Ledger | None:
    """Return the ledger without its current stage; None if there is no other."""
    return replace(start, stages=start.stages[:-1]) if len(start.stages) > 1 else None


def past_streams(ledger: Ledger | None) -> dict[str, PastStream]:
    """Return what a lineage has consumed; nothing for a first stage."""
    if ledger is None:
        return {}
    paths = {
        s.content_hash: s.path for stage in ledger.stages for s in stage.plan.sources if stage.consumed.get(s.name)
    }
    return {
        content_hash: PastStream(
            name=source.name.removeprefix("replay-"),
            path=paths[content_hash],
            segments=tuple(segments),
            tokens=tuple(_tokens(ledger, content_hash)),
        )
        for content_hash, (source, segments) in ledger.consumed_segments().items()
    }


def _tokens(ledger: Ledger, content_hash: str) -> Iterable[int]:
    for stage in ledger.stages:
        names = [source.name for source in stage.plan.sources if source.content_hash == content_hash]
        yield sum(stage.consumed.get(name, 0) for name in names)


def going_on(segment: Segment, consumed: Iterable[Segment]) -> Segment:
    """Return `segment`, open ended, from where the same order was left; at its beginning if it was never read.

    The same order is that of the same key, sample length, subset and curriculum.
    """
    ends = [s.start + (s.count or 0) for s in consumed if same_order(s, segment)]
    return replace(segment, start=max(ends, default=0), count=None)


def same_order(one: Segment, other: Segment) -> bool:
    """Whether two segments are stretches of the same order."""
    return replace(one, start=0, count=None) == replace(other, start=0, count=None)
