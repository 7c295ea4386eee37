"""Heat maps of experts: layers by the time since each boundary, and experts by streams."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from megacpt.report.figures.frame import Line
from megacpt.report.record import RunRecord
from megacpt.report.routing import even_load, timeline
from megacpt.report.routing_record import RoutingPoint
from megacpt.report.style import colour, light
from megacpt.report.svg import Size
from megacpt.report.words import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = 8  # of the shades: few enough that cells of one shade are one shape
STRONGEST = 0.95  # the least see-through of them
MOST_LAYERS = 6  # whose experts are drawn one by one
MOST_STREAMS = 6
Grid = Sequence[Sequence[float]]
"""Rows of cells, from the top, each between 0 and 1."""


def layer_figure(line: Line, streams: Sequence[str], colours: Mapping[str, int], size: Size) -> Figure:
    """Draw, for each stream, the imbalance and the change of each layer at doubling steps since each boundary.

    Args:
        line: the line of runs, oldest first.
        streams: its held-out streams that were routed.
        colours: number of the colour of each stream.
        size: the room there is.
    """
    shown = list(streams)[:MOST_STREAMS]
    stages = [_measured(record, shown) for record in line]
    columns = [column for stage in stages for column in stage]
    layers = max((point.layers for column in columns for point in column.values()), key=len)
    figure, rows = _panels(len(shown), 2, min(max(0.12 * len(layers), 0.7), 2.6), size)
    top, changed = layer_extremes(line, streams)
    for stream, pair in zip(shown, rows, strict=True):
        points = [column.get(stream) for column in columns]
        scales = (("max_load", even_load(line[-1]) or 0.0, top), ("saturation_start", 1.0, 1 - changed))
        for axes, text, scale in zip(pair, ("busiest expert", "changed"), scales, strict=True):
            _cells(axes, _rows(points, len(layers), *scale), colour(colours[stream]))
            axes.set_title(f"{shortened(stream, 18)}: {text}", fontsize=10, color=light("ink"), loc="left")
            _layer_ticks(axes, layers)
            _step_ticks(axes, [[next(iter(column.values())).step for column in stage] for stage in stages])
    return figure


def layer_extremes(line: Line, streams: Sequence[str]) -> tuple[float, float]:
    """The largest imbalance of a layer and the largest share of its choices that changed: the strongest cells."""
    points = [p for stream in streams[:MOST_STREAMS] for record in line for p in timeline(record, stream)]
    loads = [x for point in points for x in point.numbers["max_load"] if math.isfinite(x)]
    same = [x for point in points for x in point.numbers.get("saturation_start", ()) if math.isfinite(x)]
    return max(loads, default=0.0), 1 - min(same, default=1.0)


def expert_figure(newest: Mapping[str, RoutingPoint], colours: Mapping[str, int], size: Size) -> Figure:
    """Draw the load of each expert on each stream, layer by layer; experts stand in the order of their streams.

    Args:
        newest: the newest measurement of each stream that tells of single experts.
        colours: number of the colour of each stream.
        size: the room there is.
    """
    streams = list(newest)[:MOST_STREAMS]
    layers = drawn_layers(newest)
    figure, rows = _panels(-(-len(layers) // (3 if size.ends else 1)), 3 if size.ends else 1, 0.2 * len(streams), size)
    every = [axes for row in rows for axes in row]
    for axes, layer in zip(every, layers, strict=False):
        table = [newest[s].experts["expert_load"][newest[s].layers.index(layer)] for s in streams]
        order = sorted(range(len(table[0])), key=lambda i: _place([row[i] for row in table]))
        most = max(max(row) for row in table) or 1.0
        for number, (stream, row) in enumerate(zip(streams, table, strict=True)):
            _cells(axes, [[row[i] / most for i in order]], colour(colours[stream]), top=number, rows=len(streams))
        axes.set_title(f"layer {layer}", fontsize=10, color=light("ink"), loc="left")
        axes.set_yticks([number + 0.5 for number in range(len(streams))], [shortened(s, 10) for s in streams])
        axes.set_xticks([])
    for axes in every[len(layers) :]:
        axes.set_visible(False)
    return figure


def drawn_layers(newest: Mapping[str, RoutingPoint]) -> list[int]:
    """The layers whose experts are drawn: all, or some of them at even distances, the first and the last included."""
    layers = sorted(set.intersection(*(set(point.layers) for point in newest.values())))
    most = min(MOST_LAYERS, len(layers))
    return [layers[round(i * (len(layers) - 1) / max(most - 1, 1))] for i in range(most)]


def _place(loads: Sequence[float]) -> float:
    """Where an expert stands between the first stream and the last."""
    return sum(i * load for i, load in enumerate(loads)) / (sum(loads) or 1.0)


def _panels(rows: int, columns: int, height: float, size: Size) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure of `rows` by `columns` panels, `height` inches high."""
    above, below, left, right, gap = 0.3, 0.28, 0.62 if columns != 1 else 0.95, 0.06, 0.55
    total = rows * (height + above + below)
    figure = Figure(figsize=(size.width, total))
    left = left if size.ends or columns != 2 else 0.32
    gap = gap if size.ends else 0.36
    width = (size.width - left - right - (columns - 1) * (gap + (0.4 if columns == 3 else 0))) / columns
    found: list[list[Axes]] = []
    for row in range(rows):
        bottom = total - (row + 1) * (height + above + below) + below
        starts = [left + n * (width + gap + (0.4 if columns == 3 else 0)) for n in range(columns)]
        boxes = [(x / size.width, bottom / total, width / size.width, height / total) for x in starts]
        found.append([figure.add_axes(box) for box in boxes])
    for axes in (axes for row in found for axes in row):
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(length=0, pad=3, labelsize=9)
    return figure, found


def _measured(record: RunRecord, streams: Sequence[str]) -> list[dict[str, RoutingPoint]]:
    """The measurements of a stage that are drawn, each of some of the streams."""
    found: dict[int, dict[str, RoutingPoint]] = {}
    for stream in streams:
        for point in timeline(record, stream):
            found.setdefault(point.step, {})[stream] = point
    return [found[step] for step in sorted(found)]


def _rows(points: Sequence[RoutingPoint | None], layers: int, measure: str, zero: float, one: float) -> Grid:
    """Rows of cells, a layer a row and a measurement a column; `zero` and `one` are the values of these heats."""
    scale = one - zero or math.inf
    columns = [() if point is None else point.numbers.get(measure, ()) for point in points]
    return [
        [(column[layer] - zero) / scale if layer < len(column) else math.nan for column in columns]
        for layer in range(layers)
    ]


def _cells(axes: Axes, grid: Grid, shade: str, top: int = 0, rows: int | None = None) -> None:
    """Draw rows of cells in shades of one colour; one shape for all cells of a shade, so that the page stays small."""
    shapes: dict[int, list[tuple[float, float, float]]] = {}
    for number, row in enumerate(grid):
        begin = 0
        for level, run in groupby(row, key=_level):
            end = begin + len(list(run))
            shapes.setdefault(level, []).append((begin, end, top + number))
            begin = end
    for level, bars in shapes.items():
        if level:
            corners = [xy for a, b, y in bars for xy in ((a, y), (b, y), (b, y + 0.94), (a, y + 0.94), (a, y))]
            codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(bars)
            alpha = STRONGEST * level / LEVELS
            axes.add_patch(PathPatch(Path(corners, codes), facecolor=shade, alpha=alpha, linewidth=0))
    axes.set_facecolor(light("stage-0"))
    axes.set_xlim(0, max(map(len, grid), default=1))
    axes.set_ylim(rows or len(grid), 0)


def _level(heat: float) -> int:
    return 0 if math.isnan(heat) else min(max(math.ceil(heat * LEVELS - 0.5), 0), LEVELS)


def _layer_ticks(axes: Axes, layers: Sequence[int]) -> None:
    shown = range(0, len(layers), max(1, -(-len(layers) // 6)))
    axes.set_yticks([row + 0.5 for row in shown], [str(layers[row]) for row in shown])


def _step_ticks(axes: Axes, stages: Sequence[Sequence[int]]) -> None:
    """Mark where each stage begins, and write steps below where there is room, the first of each stage before others.

    Args:
        axes: where; a column of cells is 1 wide.
        stages: the step of each column of each stage.
    """
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    ends = list(accumulate(map(len, stages), initial=0))
    for end in ends[1:-1]:
        axes.axvline(end, color=light("muted"), linewidth=1.0, linestyle=(0, (2, 2)))
    to_an_inch = ends[-1] / (axes.get_position().width * figure.get_size_inches()[0])
    every = [
        (begin + n + 0.5, f"{step:,}")
        for begin, stage in zip(ends, stages, strict=False)
        for n, step in enumerate(stage)
    ]
    shown: list[tuple[float, str]] = []
    for place, text in sorted(every, key=lambda tick: tick[0] - 0.5 not in ends):
        if all(abs(place - x) > 0.04 * to_an_inch * (len(text) + len(other) + 1) for x, other in shown):
            shown.append((place, text))
    axes.set_xticks([place for place, _ in shown], [text for _, text in shown])
