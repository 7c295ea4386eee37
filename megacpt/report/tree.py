"""The tree of stages of a report: what continues what, and what each stage changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from megacpt.continuation.ledger import Ledger, StageRecord
from megacpt.continuation.lineage.words import counted
from megacpt.report.lineage import parents
from megacpt.report.record import RunRecord
from megacpt.report.words import TIMES, percent, short_rate, short_tokens


@dataclass
class Node:
    """A stage in the tree.

    Attributes:
        stage: what the ledger says about it.
        ledger: that of the run, up to this stage; None where the run is not at hand.
        folder: the run folder, if it is at hand.
        start: tokens of the lineage before the stage.
        subject: whether it is part of the line that the report is about.
        children: the stages that continue it, the subject's first.
    """

    stage: StageRecord
    ledger: Ledger | None
    folder: str | None
    start: int
    subject: bool
    children: list[Node] = field(default_factory=list)


def grow(records: Sequence[RunRecord], subject: Iterable[RunRecord]) -> list[Node]:
    """Return the roots of the tree of `records`; stages whose runs are not at hand are taken from the ledgers."""
    chosen = {record.folder.resolve() for record in subject}
    nodes = {
        record.folder: Node(
            record.ledger.stage,
            record.ledger,
            str(record.folder),
            record.start,
            record.folder.resolve() in chosen,
        )
        for record in records
    }
    top = Node(records[0].ledger.stage, None, None, 0, True)  # stands for what all roots have in common: nothing
    missing: dict[str, Node] = {}
    origin, known = parents(records), {record.folder: len(record.ledger.stages) for record in records}
    for record in records:
        parent = origin[record.folder]
        place, first = (top, 0) if parent is None else (nodes[parent], known[parent])
        for number in range(first, len(record.ledger.stages) - 1):
            stage = record.ledger.stages[number]
            key = f"{id(place)} {stage.identity()}"
            if key not in missing:
                start = sum(earlier.tokens for earlier in record.ledger.stages[:number])
                missing[key] = Node(stage, None, None, start, False)
                place.children.append(missing[key])
            place = missing[key]
            place.subject |= nodes[record.folder].subject
        place.children.append(nodes[record.folder])
    for node in (top, *nodes.values(), *missing.values()):
        node.children.sort(key=lambda child: not child.subject)
    return top.children


def tree_list(roots: Sequence[Node]) -> str:
    """The tree as nested lists: what continues a stage stands below it, other branches are set in."""
    return f'<ol class="tree">{"".join(_line(root) for root in roots)}</ol>'


def _line(node: Node) -> str:
    """A stage, and then in the same list what continues it."""
    branches = "".join(f"<ol>{_line(child)}</ol>" for child in node.children[1:])
    kind = ' class="subject"' if node.subject else ""
    return f"<li{kind}>{_described(node)}{branches}</li>{''.join(map(_line, node.children[:1]))}"


def _described(node: Node) -> str:
    stage = node.stage
    here = "" if stage.kind == "converted" else " <code>run not found</code>"
    if node.ledger is not None and node.folder is not None:
        name = Path(node.folder).name
        here = f" <code>{'' if name == stage.name else f'{escape(name)} '}{node.ledger.id}</code>"
    lines = [f'<b>{escape(stage.name)}</b> <span class="kind">{escape(stage.kind)}</span>{here}']
    if stage.tokens:
        length = f"{short_tokens(stage.tokens)} tokens in {counted(stage.steps, 'step')}"
        lines.append(
            f"<div>{length}, from {short_tokens(node.start)} to {short_tokens(node.start + stage.tokens)}</div>"
        )
    if stage.consumed and stage.tokens:
        parts = (f"{name} {percent(n / stage.tokens)}" for name, n in stage.consumed.items() if n)
        lines.append(f"<div>{escape(', '.join(parts))}</div>")
    if stage.tokens:
        rate = "" if stage.rate is None else f", rate {short_rate(stage.rate)} ({stage.phase})"
        size = f"batch {stage.batch} {TIMES} {stage.seq_length:,}"
        lines.append(f"<div>{escape(str(stage.schedule.get('kind', '')))} schedule{escape(rate)}, {size}</div>")
    changed = [f"{key}: {short(old)} → {short(new)}" for key, (old, new) in _pairs(stage.changes)]
    if changed:
        lines.append(f"<div>changed {escape('; '.join(changed))}</div>")
    return "".join(lines)


def _pairs(changes: dict[str, Any]) -> list[tuple[str, tuple[Any, Any]]]:
    return [(key, (pair[0], pair[1])) for key, pair in changes.items()]


def short(value: Any, most: int = 40) -> str:
    """A value of a configuration in at most `most` letters."""
    if isinstance(value, float):
        text = f"{value:g}"
    elif isinstance(value, dict):
        text = ", ".join(f"{key} {short(part)}" for key, part in value.items()) or "none"
    elif isinstance(value, list | tuple):
        text = ", ".join(map(short, value)) or "none"
    else:
        text = "none" if value is None else str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"
