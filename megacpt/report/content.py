"""What a report tells, before it is drawn: the line that it is about, others beside it, and what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megacpt.errors import CheckpointError
from megacpt.report.lineage import lines, only, run_folders, with_ancestors
from megacpt.report.measures import Measures, StreamGap, measures
from megacpt.report.outcome import Outcome, Reading, outcome, readings
from megacpt.report.record import RunRecord, load_run
from megacpt.report.routing import Shift, shifts
from megacpt.report.shares import Mixture, mixtures
from megacpt.report.tree import Node, grow

Line = list[RunRecord]


@dataclass(frozen=True)
class Told:
    """A line of runs and what came of it; `routed` is what each boundary did to the experts, empty without any."""

    line: Line
    found: Outcome
    measured: Measures
    routed: Sequence[Shift]


@dataclass(frozen=True)
class Content:
    """All that a report tells.

    Attributes:
        title: heading of the page.
        label: what the subject is called beside others.
        subject: the line that the report is about.
        others: other lines by name.
        roots: of the tree of all runs.
        mixed: the mixture of each stage of the subject.
        read: what the subject read of each stream.
        colours: number of the colour of each stream.
    """

    title: str
    label: str
    subject: Told
    others: Mapping[str, Told]
    roots: Sequence[Node]
    mixed: Sequence[Mixture]
    read: Sequence[Reading]
    colours: Mapping[str, int]

    def apart(self, other: Told) -> list[StreamGap]:
        """The gaps of another line in the stages that are not the subject's too."""
        own = {record.folder.resolve() for record in self.subject.line}
        return [gap for gap in other.measured.gaps if other.line[gap.stage].folder.resolve() not in own]


def gather(
    runs: Sequence[Path],
    title: str | None = None,
    compare: Mapping[str, Sequence[Path]] | None = None,
    label: str | None = None,
) -> Content:
    """Read run folders, those they descend from, and those that are compared; arguments and errors as `write_report`.

    Raises:
        CheckpointError: a folder holds no run, a ledger is damaged, or nothing has been measured yet.
        ConfigError: a run.yaml is damaged.
    """
    records: dict[Path, RunRecord] = {}

    def load(folders: Sequence[Path]) -> list[RunRecord]:
        for folder in folders:
            if folder.resolve() not in records:
                records[folder.resolve()] = load_run(folder)
        return [records[folder.resolve()] for folder in folders]

    line, beside = _subject(load(with_ancestors(run_folders(runs))))
    if not any(record.train or record.evaluations for record in line):
        raise CheckpointError(f"{line[-1].folder} has no metrics yet: they are written while it is trained")
    name = label or (line[-1].folder.name if beside else "this lineage")
    for other, folders in (compare or {}).items():
        beside[other] = only(load(with_ancestors(folders)))
    subject = _told(line)
    mixed = mixtures(line[-1].ledger.stages)
    names = [*subject.found.streams, *(stream for mixture in mixed for stream in mixture.streams)]
    return Content(
        title or " → ".join(record.name for record in line),
        name,
        subject,
        {other: _told(found) for other, found in beside.items()},
        grow(list(records.values()), line),
        mixed,
        readings(line),
        {stream: number for number, stream in enumerate(dict.fromkeys(names))},
    )


def _told(line: Line) -> Told:
    found = outcome(line)
    return Told(line, found, measures(line, found), shifts(line))


def _subject(records: Sequence[RunRecord]) -> tuple[Line, dict[str, Line]]:
    """The longest line of descent, and the others by the name of their last folder."""
    found = lines(records)
    longest = max(found, key=lambda line: (len(line), line[-1].end))
    found.remove(longest)
    names = [line[-1].folder.name for line in found]
    unique = len(set(names)) == len(names)
    return longest, {name if unique else str(line[-1].folder): line for name, line in zip(names, found, strict=True)}
