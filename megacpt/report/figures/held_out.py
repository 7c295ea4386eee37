"""The curves of the held-out streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from megacpt.report.figures.frame import Line, apart, curve_ends, fit, name_ends, panels, settled, thinned
from megacpt.report.outcome import curve
from megacpt.report.record import EvalPoint
from megacpt.report.style import COMPARED, DashStyle, colour
from megacpt.report.svg import Size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 60  # points of a curve that are marked one by one


def held_out_figure(line: Line, streams: Sequence[str], compare: Mapping[str, Line], size: Size) -> Figure:
    """Draw bits a byte of each held-out stream against tokens of the lineage, with other lines beside.

    Args:
        line: the line of runs, oldest first.
        streams: their held-out streams; the order decides the colours.
        compare: other lines by name; runs that they share with `line` are drawn once.
        size: the room there is.
    """
    figure, (axes,) = panels(line, streams, size, [3.4])
    shown: list[EvalPoint] = []
    others = apart(compare, line)
    for index, stream in enumerate(streams):
        points = curve(line, stream)
        shown += settled(points, line)
        _plot(axes, thinned(points, size), colour(index), "-", 2.2)
        for number, (name, other) in enumerate(others.items()):
            beside = curve(other, stream)
            shown += settled(beside, compare[name])
            _plot(axes, thinned(beside, size), colour(index), COMPARED[number % len(COMPARED)], 1.5)
    axes.set_xlim(right=max([axes.get_xlim()[1], *(other[-1].end for other in others.values() if other)]))
    fit(axes, [point.bits_per_byte for point in shown])
    if size.ends:
        name_ends(axes, curve_ends(line, streams))
    return figure


def _plot(axes: Axes, points: Sequence[EvalPoint], shade: str, style: DashStyle, width: float) -> None:
    axes.plot(
        [point.tokens for point in points],
        [point.bits_per_byte for point in points],
        color=shade,
        linestyle=style,
        linewidth=width,
        marker="o" if style == "-" and len(points) <= FEW else None,
        markersize=3.5,
        solid_joinstyle="round",
    )
