"""Whether the ledgers of runs and checkpoints fit together: in a run, between parent and child, in their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megacpt.checkpoint.manifest import digest, incomplete, read_manifest
from megacpt.checkpoint.store import checkpoint_step
from megacpt.continuation.boundary import RUN, START
from megacpt.continuation.changes import differences, flat
from megacpt.continuation.ledger import LEDGER, Ledger, StageRecord
from megacpt.continuation.lineage.forest import Forest, Node
from megacpt.continuation.planning.past import going_on
from megacpt.data.plan import DRAWN, Segment
from megacpt.errors import CheckpointError


def ledgers_of(node: Node) -> Iterator[tuple[Path, Ledger]]:
    """Yield every ledger of a run or a checkpoint that can be read, with its file; the start of a run comes first."""
    paths = [node.folder / START] if node.is_run and node.folder is not None else []
    folders = node.checkpoints if node.is_run or node.folder is None else (node.folder,)
    for path in (*paths, *(folder / LEDGER for folder in folders)):
        try:
            yield path, Ledger.read_file(path)
        except CheckpointError:  # `check_files` tells
            continue


def check_files(node: Node) -> Iterator[str]:
    """Yield what is wrong with the files of a node: a ledger that was changed, missing files, files of another size.

    The small files are compared with the manifest's hashes; weights only by their sizes.
    """
    folders = node.checkpoints if node.is_run or node.folder is None else (node.folder,)
    for path in [node.folder / START] if node.is_run and node.folder is not None else []:
        yield from _unreadable(path)
    for folder in folders:
        yield from _unreadable(folder / LEDGER)
        if (wrong := incomplete(folder)) is not None:
            yield wrong
            continue
        files = read_manifest(folder)
        for name in (LEDGER, RUN):
            if name in files and digest(folder / name) != files[name]["sha256"]:
                yield f"{folder / name} has changed since it was written (its hash differs from the manifest's)"


def _unreadable(path: Path) -> Iterator[str]:
    try:
        Ledger.read_file(path)
    except CheckpointError as error:
        yield str(error)


def check_run(node: Node) -> Iterator[str]:
    """Yield what does not fit among the ledgers of one run, and in the numbers of each."""
    found = list(ledgers_of(node))
    for path, ledger in found:
        stage = ledger.stage
        if stage.tokens != (made := stage.steps * stage.batch * stage.seq_length):
            yield f"{path}: {stage.steps:,} steps make {made:,} tokens, and it says {stage.tokens:,}"
        if path.name == LEDGER and ledger.derived is None and checkpoint_step(path.parent) != stage.steps:
            yield f"{path} says step {stage.steps:,}, and its folder another"
        first = found[0][1]
        other = replace(ledger, stages=(*ledger.stages[:-1], first.stage))
        if other.id != first.id or not stage.is_same(first.stage):
            yield f"{path} is of another run than {found[0][0]}: {_what_differs(first, ledger)}"


def _what_differs(first: Ledger, ledger: Ledger) -> str:
    """Name what of two ledgers of a run should be the same and is not."""
    parts = [
        {"parent": ledger.parent, "model": ledger.model, "tokenizer": ledger.tokenizer["fingerprint"]}
        | {"earlier stages": [stage.content() for stage in ledger.stages[:-1]], "derived": ledger.derived}
        | {f"stage.{key}": value for key, value in ledger.stage.identity().items()}
        for ledger in (first, ledger)
    ]
    return ", ".join(differences(*map(flat, parts))) + " differ"


def check_parent(node: Node, forest: Forest) -> Iterator[str]:
    """Yield what does not fit between a node and what it began on."""
    ledger, parent = node.ledger, node.parent
    if ledger.parent is None or node.folder is None:
        return
    if parent is None or parent.folder is None:
        said = _run_of(ledger.parent_path)
        there = next((other for other in forest if other.folder is not None and other.folder.resolve() == said), None)
        if there is not None and there is not node:
            yield (
                f"{node.folder} began on the checkpoint {ledger.parent}, and {there.folder}, which it names, is not "
                "the run of that checkpoint: its stages are others"
            )
        return
    before = None if parent.ledger.weights_alone else node.origin  # averaged weights have no rate to go on from
    if before is not None and None not in (before.rate, node.stage.entry_rate) and before.rate != node.stage.entry_rate:
        yield f"{node.folder} began at the rate {node.stage.entry_rate}, and its parent stopped at {before.rate}"


def unproven(node: Node) -> str | None:
    """Say which link to a parent cannot be looked at, if it is so."""
    if node.folder is None or node.ledger.parent is None:
        return None
    if node.parent is not None and node.parent.folder is not None:
        return None
    return f"{node.folder} began on {node.ledger.parent}, which is in none of these folders ({node.ledger.parent_path})"


def _run_of(parent_path: str | None) -> Path | None:
    return None if parent_path is None else Path(parent_path).parent.parent.resolve()


def check_going_on(node: Node) -> Iterator[str]:
    """Yield what does not follow from the stages before: streams that go on elsewhere, replay of what was not read.

    A stage goes on in a stream where the same order was left, so that nothing is read twice or passed over unnoticed;
    and it draws only from samples that were consumed.
    """
    ledger = node.ledger
    if ledger.derived is not None or node.folder is None:
        return  # stages that several lines have read beside each other
    past = consumed(ledger, ledger.stages[:-1])
    for source in node.stage.plan.sources:
        before = past.get(source.content_hash, [])
        for segment in source.segments:
            where = f"{node.folder}: stage {node.stage.name}: {source.name}"
            if source.policy in DRAWN:
                if not _within(segment, before):
                    yield f"{where} replays samples that the lineage had not consumed ({_stretch(segment)})"
            elif segment != (expected := going_on(segment, before)):
                yield f"{where} begins at sample {segment.start:,} of its order, which was left at {expected.start:,}"


def consumed(ledger: Ledger, stages: Sequence[StageRecord]) -> dict[str, list[Segment]]:
    """Return what the stages have consumed, by content hash of the stream."""
    if not stages:
        return {}
    return {key: segments for key, (_, segments) in replace(ledger, stages=tuple(stages)).consumed_segments().items()}


def _within(segment: Segment, consumed: Sequence[Segment]) -> bool:
    """Whether a stretch of an order lies in those that were consumed of it, joined."""
    at, end = segment.start, segment.start + (segment.count or 0)
    same = [s for s in consumed if replace(s, start=0, count=None) == replace(segment, start=0, count=None)]
    for other in sorted(same, key=lambda s: s.start):
        if other.start <= at:
            at = max(at, other.start + (other.count or 0))
    return at >= end


def _stretch(segment: Segment) -> str:
    return f"samples {segment.start:,} to {segment.start + (segment.count or 0):,}, of {segment.seq_length:,} tokens"
