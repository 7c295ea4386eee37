"""What each boundary did to the older streams: a panel a boundary, the first steps drawn wide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from megacpt.report.figures.frame import quiet, thinned
from megacpt.report.measures import StreamGap
from megacpt.report.style import COMPARED, DashStyle, colour, light
from megacpt.report.svg import Size
from megacpt.report.words import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 12  # panels; the tables have all boundaries
Gaps = Sequence[StreamGap]


def gap_figure(
    gaps: Gaps, stages: Sequence[str], colours: Mapping[str, int], compare: Mapping[str, Gaps], size: Size
) -> Figure:
    """Draw the change of each older stream since the boundary against the steps since then, the latest boundaries.

    Args:
        gaps: of the line.
        stages: names of its stages.
        colours: number of the colour of each stream.
        compare: the gaps of other lines by name, drawn beside where a stage has the same number.
        size: the room there is.
    """
    chosen = sorted({gap.stage for gap in gaps})[-MOST:]
    columns = min(len(chosen), 3) if size.ends else 1
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(size.width, 0.35 + 2.35 * rows))
    every = figure.subplots(rows, columns, sharey=True, squeeze=False)
    left = 0.62 / size.width
    height = 0.35 + 2.35 * rows
    figure.subplots_adjust(left, 0.5 / height, 0.985, 1 - 0.32 / height, wspace=0.12, hspace=0.5)
    panels = list(every.flat)
    for axes, stage in zip(panels, chosen, strict=False):
        for number, other in enumerate(compare.values()):
            for gap in other:
                if gap.stage == stage:
                    _plot(axes, gap, colours, COMPARED[number % len(COMPARED)], size)
        for gap in gaps:
            if gap.stage == stage:
                _plot(axes, gap, colours, "-", size)
        last = max(gap.points[-1].step - gap.points[0].step for gap in gaps if gap.stage == stage)
        _dress(axes, f"into {shortened(stages[stage], 30)}", last)
    for axes in panels[len(chosen) :]:
        axes.set_visible(False)
    return figure


def _plot(axes: Axes, gap: StreamGap, colours: Mapping[str, int], style: DashStyle, size: Size) -> None:
    points = thinned(gap.points, size)
    steps = [point.step - gap.points[0].step for point in points]
    losses = [point.bits_per_byte - gap.gap.before for point in points]
    if not math.isnan(gap.gap.before):
        shade, width = colour(colours[gap.stream]), 2.0 if style == "-" else 1.4
        axes.plot(steps, losses, color=shade, linestyle=style, linewidth=width)
    if style == "-" and gap.gap.depth > 0:
        peak = next(p for p in gap.points if p.step - gap.points[0].step == gap.gap.peak)
        axes.plot([gap.gap.peak], [peak.bits_per_byte - gap.gap.before], "o", color=colour(colours[gap.stream]))


def _dress(axes: Axes, text: str, last: int) -> None:
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xlim(0, last)
    powers = [2**n for n in range(0, last.bit_length(), 3 if last > 64 else 2)]
    axes.xaxis.set_major_locator(FixedLocator([0, *powers]))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if abs(value) < 1e-9 else f"{value:+.3g}"))
    axes.axhline(0, color=light("muted"), linewidth=0.9)
    quiet(axes)
    axes.set_title(text, fontsize=10, fontweight="bold", color=light("ink"), loc="left")
    axes.set_xlabel("steps since the boundary", loc="left")
