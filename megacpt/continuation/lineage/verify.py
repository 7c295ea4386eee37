"""Proving ledgers: their ids, their chain, the streams on disk, and every token count from the samples themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import Progress, TaskID

from megacpt.continuation.ledger import Ledger
from megacpt.continuation.lineage.chain import (
    check_files,
    check_going_on,
    check_parent,
    check_run,
    ledgers_of,
    unproven,
)
from megacpt.continuation.lineage.forest import Forest, grow_forest
from megacpt.continuation.lineage.places import StreamPlaces, check_stream, stream_bytes
from megacpt.continuation.lineage.recount import Claim, recount, share_stages
from megacpt.continuation.lineage.words import counted, short_tokens
from megacpt.errors import DataError


class Watch:
    """Follows the work that takes long. This one does not look."""

    def begin(self, what: str, total: int) -> None:
        """A piece of work of `total` units begins."""

    def advance(self, units: int) -> None:
        """So many units have been done since it was last told."""


class Bars(Watch):
    """Shows each piece of work as a bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def begin(self, what: str, total: int) -> None:
        """Show a new bar, if there is anything to do."""
        self._task = self._progress.add_task(what, total=total) if total else None

    def advance(self, units: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.advance(self._task, units)


@dataclass
class Verdict:
    """What was found.

    Attributes:
        proven: what holds, with how much of it was looked at.
        wrong: what does not, with the name of the file, run, stage or stream.
        unproven: what could not be looked at.
    """

    proven: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Stream:
    """A stream that stages have read: its name, where it was, and the tokenizers of the ledgers that name it."""

    name: str
    hints: dict[str, None] = field(default_factory=dict)
    fingerprints: dict[str, None] = field(default_factory=dict)


def verify(
    paths: Sequence[Path], quick: bool = False, data: Sequence[Path] = (), watch: Watch | None = None
) -> Verdict:
    """Prove the ledgers of all runs and checkpoints in and below `paths`.

    Args:
        paths: runs, checkpoints, or folders that hold some.
        quick: compare the sizes of streams instead of reading them, and compute counts instead of locating samples.
        data: folders in which moved streams are looked for, beside `paths`.
        watch: follows the reading of streams and the counting.

    Raises:
        CheckpointError: if there is nothing to prove.
    """
    watch = watch or Watch()
    forest = grow_forest(paths)
    verdict = Verdict()
    _check_ledgers(forest, verdict)
    claims, streams = _claims(forest)
    places = _find(streams, StreamPlaces([*data, *paths]), verdict)
    good = _check_streams(streams, places, quick, watch, verdict)
    _check_counts(claims, good, quick, watch, verdict)
    return verdict


def _check_ledgers(forest: Forest, verdict: Verdict) -> None:
    before = len(verdict.wrong)
    ledgers = links = 0
    named: dict[str, None] = dict.fromkeys(forest.problems)
    for node in forest:
        ledgers += sum(1 for _ in ledgers_of(node))
        if node.parent is not None and node.parent.folder is not None and node.folder is not None:
            links += 1
        for problems in (check_files(node), check_run(node), check_parent(node, forest), check_going_on(node)):
            named.update(dict.fromkeys(problems))
        if (text := unproven(node)) is not None:
            verdict.unproven.append(text)
    verdict.wrong += named
    if len(verdict.wrong) == before:
        verdict.proven.append(f"{counted(ledgers, 'ledger')}: ids and numbers fit, {counted(links, 'link')} to parents")


def _claims(forest: Forest) -> tuple[list[Claim], dict[str, _Stream]]:
    """Return what ledgers say of stages, and the streams that these have read, by content hash."""
    claims: list[Claim] = []
    streams: dict[str, _Stream] = {}
    for node in forest:
        for path, ledger in ledgers_of(node):
            claims += [Claim(stage, str(path)) for stage in ledger.stages if stage.plan.sources]
            _note(ledger, streams)
    return claims, streams


def _note(ledger: Ledger, streams: dict[str, _Stream]) -> None:
    for stage in ledger.stages:
        for source in stage.plan.sources:
            known = streams.setdefault(source.content_hash, _Stream(source.name.removeprefix("replay-")))
            known.hints[source.path] = None
            known.fingerprints[ledger.tokenizer["fingerprint"]] = None


def _find(streams: dict[str, _Stream], places: StreamPlaces, verdict: Verdict) -> dict[str, Path]:
    found = {}
    for content_hash, stream in streams.items():
        place = places.find(content_hash, reversed(stream.hints))
        if place is None:
            said = ", ".join(stream.hints)
            verdict.wrong.append(
                f"the stream {stream.name} (content hash {content_hash[:16]}) is not at {said}: put it back, or name "
                "the folder that it is in with --data"
            )
        else:
            found[content_hash] = place
    return found


def _check_streams(
    streams: dict[str, _Stream], places: dict[str, Path], quick: bool, watch: Watch, verdict: Verdict
) -> dict[str, Path]:
    """Return the streams that are what the ledgers say."""
    good: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    for content_hash, place in places.items():
        try:
            check_stream(place, content_hash, streams[content_hash].fingerprints, None)
            sizes[content_hash] = stream_bytes(place)
        except DataError as error:
            verdict.wrong.append(str(error))
    watch.begin("reading streams", 0 if quick else sum(sizes.values()))
    for content_hash in sizes:
        try:
            if not quick:
                check_stream(places[content_hash], content_hash, (), watch.advance)
            good[content_hash] = places[content_hash]
        except DataError as error:
            verdict.wrong.append(str(error))
    if good and len(good) == len(streams):
        how = "sizes agree (contents were not read)" if quick else f"{sum(sizes.values()):,} bytes read, hashes agree"
        verdict.proven.append(f"{counted(len(good), 'stream')}: {how}")
    return good


def _check_counts(claims: list[Claim], good: dict[str, Path], quick: bool, watch: Watch, verdict: Verdict) -> None:
    stages = share_stages(claims)
    counted_stages = [s for s in stages if all(source.content_hash in good for source in s.plan.sources)]
    for stage in stages:
        lost = sorted({source.name for source in stage.plan.sources if source.content_hash not in good})
        if lost:
            names = ", ".join(lost)
            verdict.unproven.append(
                f"stage {stage.claims[-1].record.name} was not counted: {names} are not as they were"
            )
    before = len(verdict.wrong)
    watch.begin("counting samples", 0 if quick else sum(stage.work for stage in counted_stages))
    for stage in counted_stages:
        try:
            verdict.wrong += recount(stage, good, quick, watch.advance)
        except DataError as error:
            verdict.wrong.append(f"stage {stage.claims[-1].record.name}: {error}")
    if len(verdict.wrong) == before and counted_stages:
        samples = sum(stage.claims[-1].samples for stage in counted_stages)
        tokens = sum(stage.claims[-1].record.tokens for stage in counted_stages)
        how = "computed from the shares" if quick else "located one by one"
        verdict.proven.append(
            f"{counted(len(counted_stages), 'stage')}: {samples:,} samples, {how}, make the {short_tokens(tokens)} "
            "tokens and all repeats that the ledgers claim"
        )
