"""The section of the page about experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from megacpt.report.content import Content, Told
from megacpt.report.figures.heat import drawn_layers, expert_figure, layer_extremes, layer_figure
from megacpt.report.figures.routing import routing_figure
from megacpt.report.routing import NEAR, Level, Shift, even_load
from megacpt.report.routing_record import RoutingPoint
from megacpt.report.svg import captioned, inline
from megacpt.report.tables import key, scrolled
from megacpt.report.words import UNKNOWN, plain

HEAD = (
    "into",
    "stream",
    "before",
    f"worst in {NEAR} steps",
    "at the end",
    "choices kept",
    "since its own stage",
)


def routing_section(content: Content) -> Iterator[str]:
    """Yield the section; nothing where the subject has no experts or nothing was measured of them."""
    line, told = content.subject.line, content.subject
    streams = [stream for stream in told.found.streams if any(record.routing.streams.get(stream) for record in line)]
    if not streams:
        return
    yield "<h2>Routing</h2>"
    yield f'<p class="note">{_about(content)}</p>'
    drawn = inline(
        "routing",
        f"Imbalance of the experts and unchanged choices for {', '.join(streams)} by tokens",
        lambda size: routing_figure(line, streams, content.colours, size),
    )
    caption = "Means over the layers. Dotted: even. Grey: the batches of training."
    yield captioned(drawn, caption, key(streams, content.colours))
    yield from _layers(content, streams)
    tables = [_shift_table(told, content.label if content.others else "")]
    tables += [_shift_table(other, name) for name, other in content.others.items()]
    if any(tables):
        yield (
            '<p class="note">What each boundary did: the busiest expert\'s share of the tokens, the mean of the layers '
            "and the worst one. Choices kept: how many are still those before the first step of the stage, and those "
            "at the end of the stream's own stage; below it the layer that changed most.</p>"
        )
        yield f'<div class="tables">{"".join(tables)}</div>'
    yield from _experts(content, streams)


def _about(content: Content) -> str:
    even = even_load(content.subject.line[-1])
    text = "Where held-out tokens go among the experts of a layer. "
    return text if even is None else f"{text}Even routing would give every expert {plain(even)} of the tokens."


def _layers(content: Content, streams: Sequence[str]) -> Iterator[str]:
    line = content.subject.line
    drawn = inline(
        "layers",
        "Imbalance and change of each layer by steps since each boundary",
        lambda size: layer_figure(line, streams, content.colours, size),
    )
    load, changed = layer_extremes(line, streams)
    yield captioned(
        drawn,
        "A row is a layer, from the input down; a column is a measurement at doubling steps since the boundary "
        "(dashed). Left: "
        f"the busiest expert's share, from even to {plain(load, 2)}. Right: choices that are no longer those of the "
        f"start of the stage, from none to {plain(changed, 2)}.",
    )


def _experts(content: Content, streams: Sequence[str]) -> Iterator[str]:
    newest: dict[str, RoutingPoint] = {}
    for record in content.subject.line:
        for stream in streams:
            for point in record.routing.streams.get(stream, ()):
                if "expert_load" in point.experts:
                    newest[stream] = point
    # Streams that are no longer measured would stand for another model.
    last = max((point.tokens for point in newest.values()), default=0)
    newest = {stream: newest[stream] for stream in streams if stream in newest and newest[stream].tokens == last}
    if not newest or not drawn_layers(newest):
        return
    yield "<h3>Experts and streams</h3>"
    drawn = inline(
        "experts", "Load of each expert by stream", lambda size: expert_figure(newest, content.colours, size)
    )
    some = len(drawn_layers(newest)) < len(next(iter(newest.values())).layers)
    yield captioned(
        drawn,
        "The stronger, the more of the stream's choices an expert gets. Columns are experts, those that the first "
        f"stream uses most at the left.{' Some of the layers; the JSON of this report has all.' if some else ''}",
    )


def _shift_table(told: Told, name: str) -> str:
    if not told.routed:
        return ""
    rows = [_row(shift, told.found.stages[shift.stage]) for shift in told.routed]
    heading = f"<h3>{escape(name)}</h3>" if name else ""
    return f"<div>{heading}{scrolled(HEAD, rows, words=2)}</div>"


def _row(shift: Shift, stage: str) -> str:
    stream = "batches of training" if shift.stream is None else escape(shift.stream)
    cells = [_cell(shift.before), _cell(shift.peak, f"step {shift.peak_step:,}: "), _cell(shift.end)]
    cells += [_cell(shift.kept), _cell(shift.kept_home)]
    return f'<tr><th>{escape(stage)}</th><td class="text">{stream}</td>{"".join(cells)}</tr>'


def _cell(level: Level | None, before: str = "") -> str:
    if level is None:
        return f"<td>{UNKNOWN}</td>"
    return f"<td>{plain(level.mean)}<small>{before}layer {level.layer} {plain(level.worst)}</small></td>"
