"""The balance of experts and how much of their routing stays as it was, over the tokens of a lineage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator

from megacpt.report.figures.frame import Line, fit, name_ends, panels, smoothed, thinned, title
from megacpt.report.routing import even_load
from megacpt.report.routing_record import RoutingPoint
from megacpt.report.style import colour, light
from megacpt.report.svg import Size
from megacpt.report.words import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = 60  # points of a curve that are marked one by one
# Measure, height in inches, what is written in the corner.
PANELS = (
    ("max_load", 2.3, "busiest expert's share of the tokens"),
    ("saturation_start", 1.9, "choices as at the start of the stage"),
    ("information_share", 1.1, "of its stream that a choice tells"),
)


def routing_figure(line: Line, streams: Sequence[str], colours: Mapping[str, int], size: Size) -> Figure:
    """Draw imbalance and saturation of each stream, means over the layers, and the expert-domain information.

    Args:
        line: the line of runs, oldest first.
        streams: its held-out streams; the axes are as wide as in the figure of those.
        colours: number of the colour of each stream.
        size: the room there is.
    """
    chosen = PANELS if any(record.routing.together for record in line) else PANELS[:2]
    figure, every = panels(line, streams, size, [height for _, height, _ in chosen])
    for axes, (measure, _, text) in zip(every, chosen, strict=True):
        shown = _training(axes, line, size) if measure == "max_load" else []
        ends = []
        for stream in ("",) if measure == "information_share" else streams:
            shade = colour(colours[stream]) if stream else light("ink")
            last = _stages(axes, line, stream, measure, shade, size, shown)
            if last is not None:
                ends.append((last, f"{shortened(stream)} {last:.2f}".strip(), shade))
        if measure == "max_load" and (even := even_load(line[-1])) is not None:
            axes.axhline(even, color=light("muted"), linewidth=1.0, linestyle=(0, (1, 2)))
            shown.append(even)
        fit(axes, shown)
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0.0), high + 0.2 * (high - low))  # room for the words
        axes.set_yticks([tick for tick in MaxNLocator(4).tick_values(low, min(high, 1.0)) if low <= tick <= 1])
        title(axes, text)
        if size.ends:
            name_ends(axes, ends)
    return figure


def _stages(
    axes: Axes, line: Line, stream: str, measure: str, shade: str, size: Size, shown: list[float]
) -> float | None:
    """Draw a measure stage by stage, since each begins anew; return its last value."""
    last = None
    for record in line:
        routing = record.routing
        points = thinned(_taken(routing.streams.get(stream, ()) if stream else routing.together, measure), size)
        if not points:
            continue
        values = [point.mean(measure) or 0.0 for point in points]
        marker = "o" if len(points) <= FEW else None
        axes.plot([point.tokens for point in points], values, color=shade, linewidth=2.0, marker=marker, markersize=3)
        shown += values
        last = values[-1]
    return last


def _training(axes: Axes, line: Line, size: Size) -> list[float]:
    """Draw the imbalance of the batches of training behind the rest; return what has to be seen of it."""
    shown: list[float] = []
    for record in line:
        points = _taken(record.routing.training, "max_load")
        tokens, values = (np.array(x) for x in ([p.tokens for p in points], [p.mean("max_load") for p in points]))
        chosen = thinned(range(len(points)), size)
        axes.plot(tokens[chosen], values[chosen], color=light("train"), linewidth=1.0, alpha=0.3)
        axes.plot(tokens[chosen], smoothed(values.astype(float))[chosen], color=light("train"), linewidth=1.4)
        shown += values.tolist()
    return shown


def _taken(points: Sequence[RoutingPoint], measure: str) -> list[RoutingPoint]:
    return [point for point in points if measure in point.numbers]
