"""What differs between two checkpoints: where their lines part, what each has read alone, and how they were trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megacpt.checkpoint.manifest import MANIFEST, read_manifest
from megacpt.checkpoint.store import checkpoints, find_checkpoint
from megacpt.continuation.boundary import START
from megacpt.continuation.changes import differences, flat
from megacpt.continuation.ledger import Ledger, StageRecord


@dataclass(frozen=True)
class Side:
    """One of two checkpoints.

    Attributes:
        place: the checkpoint; the run folder if it has none yet.
        ledger: what it has seen.
        alone: the stages, or later parts of a common stage, that the other has not seen, oldest first.
    """

    place: Path
    ledger: Ledger
    alone: tuple[StageRecord, ...]


@dataclass(frozen=True)
class StreamRow:
    """Tokens of one stream over a whole lineage: those of A and of B, and how many of them were replay."""

    name: str
    content_hash: str
    a: int
    b: int
    a_replayed: int
    b_replayed: int


@dataclass(frozen=True)
class Diff:
    """Two checkpoints beside each other.

    Attributes:
        a, b: the checkpoints.
        common: the stages that both have seen, the last one as far as both did.
        streams: tokens by stream, in the order of their first use.
        settings: dotted key to the values of A's and B's last stage, where they differ.
        circumstances: the same of what does not change what was seen: run, layouts, versions, seconds.
        same_tensors: whether the files of weights and optimizer are equal bit for bit; None where they cannot be
            compared, as one has none or they were written in other layouts.
    """

    a: Side
    b: Side
    common: tuple[StageRecord, ...]
    streams: tuple[StreamRow, ...]
    settings: dict[str, tuple[Any, Any]]
    circumstances: dict[str, tuple[Any, Any]]
    same_tensors: bool | None

    @property
    def relation(self) -> str:
        """How the two stand to each other: ``same``, ``a before b``, ``b before a``, ``parted`` or ``unrelated``."""
        if self.a.ledger.id == self.b.ledger.id:
            return "same"
        if not self.common:
            return "unrelated"
        for relation, side, other in (("a before b", self.a, self.b), ("b before a", self.b, self.a)):
            if not side.alone and (side.ledger.derived is None or side.ledger.id == other.ledger.parent):
                return relation
        return "parted"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON."""
        sides = {
            name: {
                "path": str(side.place),
                "id": side.ledger.id,
                "tokens": side.ledger.tokens,
                "derived": side.ledger.derived,
                "alone": [asdict(stage) for stage in side.alone],
            }
            for name, side in (("a", self.a), ("b", self.b))
        }
        return {
            "format": 1,
            **sides,
            "relation": self.relation,
            "common": [asdict(stage) for stage in self.common],
            "streams": [asdict(row) for row in self.streams],
            "settings": {key: list(pair) for key, pair in self.settings.items()},
            "circumstances": {key: list(pair) for key, pair in self.circumstances.items()},
            "same_tensors": self.same_tensors,
        }


def compare(a: Path, b: Path) -> Diff:
    """Compare two checkpoints, or run folders for their newest ones.

    Raises:
        CheckpointError: if one is missing or damaged.
    """
    places = _checkpoint(a), _checkpoint(b)
    first, second = (_ledger(place) for place in places)
    common = tuple(_common(first.stages, second.stages))
    alone = (tuple(_beyond(ledger.stages, common)) for ledger in (first, second))
    sides = [Side(*parts) for parts in zip(places, (first, second), alone, strict=True)]
    return Diff(
        sides[0],
        sides[1],
        common,
        tuple(_streams(first, second)),
        _grouped(differences(_settings(first), _settings(second))),
        differences(_circumstances(first), _circumstances(second)),
        _same_tensors(*places),
    )


def _checkpoint(path: Path) -> Path:
    """Return what a path means: a checkpoint, or a run that has none yet."""
    if (path / START).is_file() and not checkpoints(path):
        return path
    return find_checkpoint(path)


def _ledger(place: Path) -> Ledger:
    return Ledger.read_file(place / START) if (place / START).is_file() else Ledger.read(place)


def _common(a: Sequence[StageRecord], b: Sequence[StageRecord]) -> Iterator[StageRecord]:
    """Yield the stages that both lines begin with; of one that they left at two moments, the earlier."""
    for one, other in zip(a, b, strict=False):
        if one.content() == other.content():
            yield one
            continue
        if one.is_same(other):
            earlier = min(one, other, key=lambda stage: stage.steps)
            if earlier.steps:
                yield earlier
        return


def _beyond(stages: Sequence[StageRecord], common: Sequence[StageRecord]) -> Iterator[StageRecord]:
    """Yield the stages of a line that come after what is common, the first one perhaps in part."""
    if common and len(stages) >= len(common):
        ours, last = stages[len(common) - 1], common[-1]
        if ours.steps > last.steps:
            read = {name: tokens - last.consumed.get(name, 0) for name, tokens in ours.consumed.items()}
            yield replace(
                ours,
                tokens=ours.tokens - last.tokens,
                steps=ours.steps - last.steps,
                consumed=read,
                seconds=max(0.0, ours.seconds - last.seconds),
            )
    yield from stages[len(common) :]


def _streams(a: Ledger, b: Ledger) -> Iterator[StreamRow]:
    """Yield the tokens of every stream that one of the lines planned to read."""
    names: dict[str, str] = {}
    counts: list[dict[str, int]] = [{}, {}, {}, {}]  # of a, of b, of a replayed, of b replayed
    for number, ledger in enumerate((a, b)):
        for stage in ledger.stages:
            for source in stage.plan.sources:
                key, tokens = source.content_hash, stage.consumed.get(source.name, 0)
                names.setdefault(key, source.name.removeprefix("replay-"))
                counts[number][key] = counts[number].get(key, 0) + tokens
                if source.role == "replay":
                    counts[number + 2][key] = counts[number + 2].get(key, 0) + tokens
    for key, name in names.items():
        yield StreamRow(name, key, *(count.get(key, 0) for count in counts))


def _settings(ledger: Ledger) -> dict[str, Any]:
    """Return what decided the numbers of the last stage, by dotted key."""
    stage = ledger.stage
    whole = sum(source.weight for source in stage.plan.sources)
    shares = {s.name: f"{100 * s.weight / whole:.4g}%" for s in stage.plan.sources if s.weight}
    model = {key: value for key, value in ledger.model.items() if key != "name"}
    found = {
        "tokenizer": ledger.tokenizer["fingerprint"][:12],
        "model": model,
        "stage": {"name": stage.name, "kind": stage.kind},
        "mixture": shares,
        "replay": {source.name: source.policy for source in stage.plan.sources if source.policy is not None},
        "phases": [asdict(phase) for phase in stage.plan.phases] or None,
        "schedule": stage.schedule,
        "entry_rate": stage.entry_rate,
        "optim": stage.optimizer,
        "carry": stage.carry,
        "batch": {"sequences": stage.batch, "seq_length": stage.seq_length},
        "precision": stage.precision,
        "seed": stage.seed,
        "controller": stage.controller,
        "derived": ledger.derived or {},
    }
    return flat(found)


def _grouped(pairs: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Return the same with the keys of a section beside each other, also those that only B has."""
    sections: dict[str, int] = {}
    for key in pairs:
        sections.setdefault(key.split(".")[0], len(sections))
    return dict(sorted(pairs.items(), key=lambda item: sections[item[0].split(".")[0]]))


def _circumstances(ledger: Ledger) -> dict[str, Any]:
    stage = ledger.stage
    found = {"run": stage.run, "layouts": list(stage.layouts), "seconds": stage.seconds, "versions": stage.versions}
    return flat(found)


def _same_tensors(a: Path, b: Path) -> bool | None:
    hashes = []
    for place in (a, b):
        if not (place / MANIFEST).is_file():
            return None
        hashes.append({name: e["sha256"] for name, e in read_manifest(place).items() if name.endswith(".distcp")})
    if not hashes[0] or hashes[0].keys() != hashes[1].keys():
        return None
    return hashes[0] == hashes[1]
