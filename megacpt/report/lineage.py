"""Which runs continue which: from run folders to the lines of descent that are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from megacpt.continuation.boundary import START, started
from megacpt.continuation.ledger import Ledger, StageRecord
from megacpt.errors import CheckpointError
from megacpt.report.record import RunRecord, load_run


def chain(folders: Sequence[Path]) -> list[RunRecord]:
    """Load runs that continue one another, the oldest first; each is cut where the next one branches off.

    Raises:
        CheckpointError: a folder holds no run, or the runs are not one line of descent.
    """
    return only([load_run(folder) for folder in _distinct(folders)])


def only(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the one line of descent that the runs are; CheckpointError if they are several."""
    found = lines(records)
    if len(found) != 1:
        ends = ", ".join(str(line[-1].folder) for line in found)
        raise CheckpointError(f"these runs are not one line of descent: there are {len(found)} ends, {ends}")
    return found[0]


def lines(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Return a line of descent for each run that no other one continues, in the order in which those were given."""
    origin = {record.folder: _parent(record, records) for record in records}
    continued = {parent.folder for parent in origin.values() if parent is not None}
    found = []
    for record in records:
        if record.folder in continued:
            continue
        line = [record]
        while (parent := origin[line[0].folder]) is not None:
            line.insert(0, cut(parent, line[0].ledger.stages[len(parent.ledger.stages) - 1]))
        found.append(line)
    return found


def parents(records: Sequence[RunRecord]) -> dict[Path, Path | None]:
    """Return for the folder of each run that of the nearest other one that it descends from."""
    found = ((record.folder, _parent(record, records)) for record in records)
    return {folder: None if parent is None else parent.folder for folder, parent in found}


def run_folders(paths: Iterable[Path]) -> list[Path]:
    """Return `paths`, those that hold run folders but are none replaced by what they hold, in the order of names."""
    found: list[Path] = []
    for path in paths:
        inside = [] if (path / START).is_file() else sorted(start.parent for start in path.glob(f"**/{START}"))
        found += inside or [path]
    return found


def with_ancestors(folders: Iterable[Path]) -> list[Path]:
    """Return the run folders and those they descend from, as far as they are still where they were; oldest first."""
    found: list[Path] = []
    for folder in folders:
        line, step = [], folder
        while step not in line and (ledger := started(step)) is not None:
            line.append(step)
            if ledger.parent_path is None:
                break
            step = Path(ledger.parent_path).parent.parent  # RUN/checkpoints/step-00001234
        found += reversed(line or [folder])
    return _distinct(found)


def cut(record: RunRecord, stage: StageRecord) -> RunRecord:
    """Return the run as it was when a later run branched off, whose ledger says `stage` about it."""
    last = record.start + stage.tokens
    return replace(
        record,
        ledger=replace(record.ledger, stages=(*record.ledger.stages[:-1], stage)),
        train=tuple(point for point in record.train if point.tokens <= last),
        evaluations={
            name: tuple(point for point in points if point.tokens <= last)
            for name, points in record.evaluations.items()
        },
        routing=record.routing.until(last),
    )


def _distinct(folders: Iterable[Path]) -> list[Path]:
    """The folders, each once however it is written, as first given."""
    found: dict[Path, Path] = {}
    for folder in folders:
        found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _parent(record: RunRecord, records: Sequence[RunRecord]) -> RunRecord | None:
    """The nearest of the runs that `record` descends from; of equal ones, that at the place the ledger names."""
    candidates = [other for other in records if _descends(record.ledger, other.ledger)]
    if not candidates:
        return None
    path = record.ledger.parent_path
    place = None if path is None else Path(path).parent.parent.resolve()
    return max(candidates, key=lambda other: (len(other.ledger.stages), other.folder.resolve() == place))


def _descends(ledger: Ledger, other: Ledger) -> bool:
    """Whether the stages of `other` are a beginning of those of `ledger`, however far `other` went since."""
    known = len(other.stages)
    if known >= len(ledger.stages):
        return False
    return all(a.is_same(b) for a, b in zip(ledger.stages[:known], other.stages, strict=True))
