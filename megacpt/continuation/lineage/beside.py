"""Two checkpoints beside each other, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megacpt.continuation.changes import shown
from megacpt.continuation.ledger import StageRecord
from megacpt.continuation.lineage.describe import changes_of, layout_name, made_by
from megacpt.continuation.lineage.diff import Diff
from megacpt.continuation.lineage.words import counted, duration, short_tokens


def draw_diff(diff: Diff) -> Iterator[RenderableType]:
    """Yield what is to be printed: the two, where they part, stages, streams, settings, circumstances."""
    yield from _sides(diff)
    yield Text(_relation(diff))
    for name, side in (("A", diff.a), ("B", diff.b)):
        if side.alone:
            yield Text.assemble(("\nonly " + name + " has seen", "bold"))
            yield from (line for stage in side.alone for line in _stage(stage))
    if any(row.a != row.b for row in diff.streams):
        yield _heading("tokens of the whole lineage by stream")
        yield _streams(diff)
    if diff.settings:
        yield _heading("settings of the last stage")
        yield _pairs(diff.settings)
    if diff.circumstances:
        yield _heading("where and with what (no part of the id)")
        yield _pairs({key: tuple(_readable(key, value) for value in pair) for key, pair in diff.circumstances.items()})
    if diff.same_tensors is not None:
        yield Text(f"\nweights and optimizer: {'equal bit for bit' if diff.same_tensors else 'different'}")


def _heading(text: str) -> Text:
    return Text.assemble(("\n" + text, "bold"))


def _sides(diff: Diff) -> Iterator[Text]:
    for name, side in (("A", diff.a), ("B", diff.b)):
        stages = counted(len(side.ledger.stages), "stage")
        yield Text.assemble((f"{name}  ", "bold"), str(side.place))
        yield Text.assemble("   ", (side.ledger.id, "cyan"), f", {stages}, {short_tokens(side.ledger.tokens)} tokens")
        if side.ledger.derived is not None:
            yield Text(f"   {made_by(side.ledger.derived)}")


def _relation(diff: Diff) -> str:
    if diff.relation == "same":
        return "\nboth have seen the same, in the same order, under the same settings"
    if diff.relation == "unrelated":
        return "\nthey have no stage in common"
    earlier = {"a before b": ("A", "B"), "b before a": ("B", "A")}.get(diff.relation)
    tokens = short_tokens(sum(stage.tokens for stage in diff.common))
    last = diff.common[-1]
    where = f"step {last.steps:,} of {last.name}, {tokens} tokens"
    if earlier is not None:
        return f"\n{earlier[1]} descends from {earlier[0]} ({where})"
    return f"\nlast in common: {where}"


def _stage(stage: StageRecord) -> Iterator[RenderableType]:
    read = ", ".join(f"{name} {short_tokens(tokens)}" for name, tokens in stage.consumed.items() if tokens)
    steps = counted(stage.steps, "step")
    yield Text(f"  {stage.name} ({stage.kind}): {steps}, {short_tokens(stage.tokens)} tokens")
    for text in ([read] if read else []) + changes_of(stage):
        yield Padding(Text(text), (0, 0, 0, 4))


def _streams(diff: Diff) -> Table:
    table = Table("stream", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("A", "of it replay", "B", "of it replay", "B - A"):
        table.add_column(column, justify="right")
    for row in diff.streams:
        more = row.b - row.a
        sign = "+" if more > 0 else ""
        numbers = (row.a, row.a_replayed, row.b, row.b_replayed)
        table.add_row(row.name, *map(short_tokens, numbers), f"{sign}{short_tokens(more)}" if more else "0")
    return table


def _pairs(pairs: Mapping[str, tuple[Any, ...]]) -> Table:
    table = Table("", "A", "B", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for key, (a, b) in pairs.items():
        table.add_row(key, *(Text(shown(value), overflow="fold") for value in (a, b)))
    return table


def _readable(key: str, value: Any) -> Any:
    """Seconds and layouts in words."""
    if key == "seconds" and value is not None:
        return duration(value)
    if key == "layouts" and value is not None:
        return ", ".join(map(layout_name, value)) or None
    return value
