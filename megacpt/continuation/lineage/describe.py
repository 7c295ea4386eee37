"""What a person wants to know of a stage of a lineage, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from rich.text import Text

from megacpt.continuation.changes import shown
from megacpt.continuation.ledger import StageRecord
from megacpt.continuation.lineage.forest import Node
from megacpt.continuation.lineage.words import counted, duration, short_tokens
from megacpt.data.plan import Policy, Source

# So many streams and changes of a stage are named; the others are counted.
_MOST = 6
# What the other lines tell already.
_TOLD = ("stage.name", "stage.kind", "stage.tokens", "stage.mixture.", "stage.phases")


def describe(node: Node) -> list[Text]:
    """Return the lines of a stage: where it is, how far it is, what it read, what it changed, its schedule."""
    if node.folder is None:
        return list(map(Text, _missing(node)))
    head = Text.assemble((str(node.folder), "bold"), "  ", (node.ledger.id, "cyan"))
    if node.ledger.derived is not None:
        return [head, Text(f"{made_by(node.ledger.derived)}; {short_tokens(node.ledger.tokens)} tokens in all")]
    return [head, *map(Text, _lines(node))]


def standing(node: Node, brief: bool = False) -> str:
    """Say how far a stage is."""
    done, steps = node.stage.steps, node.steps
    if node.folder is None:
        return "not here" if brief else "not in these folders"
    if node.ledger.derived is not None:
        return str(node.ledger.derived.get("operation", "derived"))
    if brief and not done:
        return "not started"
    if brief and steps is not None and done >= steps:
        return "complete"
    return f"{done:,} of {steps:,} steps" if steps is not None else counted(done, "step")


def shares(node: Node) -> str:
    """Return the part that each stream has had of a stage, the largest first, and that of all replay."""
    stage = node.stage
    if not stage.tokens:
        return ""
    replayed = [source.name for source in stage.plan.sources if source.role == "replay"]
    parts = {name: tokens for name, tokens in stage.consumed.items() if name not in replayed}
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    replay = sum(stage.consumed.get(name, 0) for name in replayed)
    return ", ".join(f"{name} {part / stage.tokens:.0%}" for name, part in (*ordered, ("replay", replay)) if part)


def made_by(derived: Mapping[str, Any]) -> str:
    """Say how weights were made that were not trained: ``average of 2 checkpoints: 8ba1c09d72fe, 90d1f8c2aa01``."""
    sources = derived.get("of", ())
    said = str(derived.get("operation", "made from other weights"))
    if sources:
        return f"{said} of {counted(len(sources), 'checkpoint')}: {', '.join(map(str, sources))}"
    rest = ", ".join(f"{key} {value}" for key, value in derived.items() if key != "operation")
    return f"{said} ({rest})" if rest else said


def _lines(node: Node) -> Iterator[str]:
    stage = node.stage
    tokens = f"{short_tokens(stage.tokens)} tokens, {short_tokens(node.ledger.tokens)} in all"
    yield f"{stage.name} ({stage.kind}): {standing(node)}, {tokens}"
    if branched := _branched(node):
        yield branched
    yield from _streams(node)
    if changed := changes_of(stage):
        more = f", and {len(changed) - _MOST} more" if len(changed) > _MOST else ""
        yield f"changed: {', '.join(changed[:_MOST])}{more}"
    rate = "not started" if stage.rate is None else f"rate {stage.rate:.3g}, {stage.phase}"
    where = f" on {', '.join(map(layout_name, stage.layouts))}" if stage.layouts else ""
    if stage.steps and not node.checkpoints and node.is_run:
        yield "its checkpoints are gone"
    yield f"{stage.schedule['kind']} schedule, {rate}" + (f"; {duration(stage.seconds)}{where}" if stage.steps else "")


def _missing(node: Node) -> Iterator[str]:
    """The lines of a stage of which only its descendants tell."""
    stage = node.stage
    yield f"{stage.name} ({stage.kind}), in none of these folders"
    was = next((child.ledger.parent_path for child in node.children if child.folder is not None), None)
    place = Path(was) if was is not None else Path(stage.run)
    there = " and is still there: name it too" if was is not None and place.exists() else ""
    yield f"it was {place}{there}"
    tokens = f"{short_tokens(stage.tokens)} tokens, {short_tokens(node.ledger.tokens)} in all"
    yield f"known up to step {stage.steps:,}: {tokens}"
    yield from _streams(node)


def _branched(node: Node) -> str | None:
    """Say at which step of its parent a stage began, unless that was the end."""
    began, parent = node.origin, node.parent
    if began is None or parent is None or parent.ledger.derived is not None:
        return None
    end = parent.stage.steps if parent.steps is None else max(parent.steps, parent.stage.steps)
    alone = len(parent.children) == 1
    if began.steps == end or (parent.folder is None and alone):
        return None
    return f"began on step {began.steps:,} of {began.name}"


def _streams(node: Node) -> Iterator[str]:
    """Say what was read of the stage's own streams, what was replayed by each policy, and how shares went."""
    stage = node.stage
    groups: dict[Policy | None, list[Source]] = {}
    for source in stage.plan.sources:
        if stage.consumed.get(source.name):
            groups.setdefault(source.policy, []).append(source)
    if not groups:
        yield "nothing read yet" if node.steps else "nothing read"
    for policy, sources in groups.items():
        texts = [_stream(node, source) for source in sources]
        rest = sum(stage.consumed[source.name] for source in sources[_MOST:])
        more = f", and {counted(len(texts) - _MOST, 'stream')} more ({short_tokens(rest)})" if rest else ""
        yield ("" if policy is None else f"replay ({policy}): ") + ", ".join(texts[:_MOST]) + more
    notes = [f"shares change {counted(len(stage.plan.phases), 'time')}"] if stage.plan.phases else []
    notes += ["a controller moves the replay"] if stage.controller is not None else []
    if notes:
        yield "; ".join(notes)


def _stream(node: Node, source: Source) -> str:
    """``english 12k (0.50 epochs)``; of a part of a stream ``english 12k (2.00 epochs of 40 windows, best)``."""
    said = f"{node.stage.repeats.get(source.name, 0):.2f} epochs"
    if source.policy is None and (segment := source.segments[0]).subset is not None:
        said += f" of {segment.subset.windows:,} windows, {segment.subset.select}"
    if source.policy is None and (curriculum := source.segments[0].curriculum) is not None:
        said += f", {curriculum.order}"
    return f"{source.name.removeprefix('replay-')} {short_tokens(node.stage.consumed[source.name])} ({said})"


def layout_name(layout: str) -> str:
    """A layout without the axes that are not used: ``tp4 dp8`` for ``tp4 pp1 cp1 dp8``."""
    return " ".join(axis for axis in layout.split() if axis.lstrip(ascii_lowercase) != "1") or "one process"


def changes_of(stage: StageRecord) -> list[str]:
    """Return what a stage changed against the one before (``batch.seq_length 2048 -> 4096``), without its mixture."""
    return [
        f"{key} {shown(before)} -> {shown(after)}"
        for key, (before, after) in stage.changes.items()
        if not key.startswith(_TOLD)
    ]
