"""What the figures over the tokens of a lineage share: axes with stages, names at the ends, thinned curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megacpt.report.outcome import curve
from megacpt.report.record import EvalPoint, RunRecord
from megacpt.report.style import colour, light
from megacpt.report.svg import Size
from megacpt.report.words import short_tokens, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = Sequence[RunRecord]
Ends = Sequence[tuple[float, str, str]]
"""Where curves end, what is written there, and in which colour."""
_T = TypeVar("_T")

LEFT = 0.58  # inches, for the numbers of the y axis
TRANSIENT = 0.04  # of a first stage: a model without training would stretch the scale beyond use


def panels(line: Line, streams: Sequence[str], size: Size, heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Make a figure of axes below one another, `heights` inches high, with the stages of the line behind them.

    Those of all figures of a line are equally wide, so that they can be read together.
    """
    above, below, between = 0.5, 0.55, 0.22
    height = above + sum(heights) + between * (len(heights) - 1) + below
    figure = Figure(figsize=(size.width, height))
    found: list[Axes] = []
    top = height - above
    for number, part in enumerate(heights):
        shared = {"sharex": found[0]} if found else {}
        box = (LEFT / size.width, (top - part) / height, _axes_width(line, streams, size) / size.width, part / height)
        axes = figure.add_axes(box, **shared)  # type: ignore[call-overload]
        top -= part + between
        frame(axes, line, named=number == 0)
        if number < len(heights) - 1:
            axes.tick_params(labelbottom=False)
            axes.set_xlabel("")
        found.append(axes)
    return figure, found


def frame(axes: Axes, line: Line, named: bool) -> None:
    """Shade the stages, name them, and give the axes their quiet look."""
    first, last = line[0].start, max(line[-1].end, line[0].start + 1)
    axes.set_xlim(first, last)
    for number, record in enumerate(line):
        end = line[number + 1].start if number + 1 < len(line) else last
        axes.axvspan(record.start, end, color=light(f"stage-{number % 2}"), zorder=0, linewidth=0)
        if number:
            axes.axvline(record.start, color=light("muted"), linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    if named:
        _name_stages(axes, line, last)
    quiet(axes)
    axes.set_xlabel("tokens of the lineage", loc="left")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_tokens(round(value))))
    axes.xaxis.set_major_locator(MaxNLocator(round(_inches(axes) / 1.0)))


def quiet(axes: Axes) -> None:
    """Leave out all lines but those that help to read."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=light("grid"), linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5)


def _inches(axes: Axes) -> float:
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    return float(axes.get_position().width * figure.get_size_inches()[0])


def _name_stages(axes: Axes, line: Line, last: int) -> None:
    """Write the names of the stages above the plot, in a second row where they are narrow; the tables name them all."""
    width = max(last - line[0].start, 1)
    taken = [-math.inf, -math.inf]  # right end of the last name in each row, as a share of the width
    for number, record in enumerate(line):
        end = line[number + 1].start if number + 1 < len(line) else last
        kind = record.ledger.stage.kind
        text = record.name if kind == "trunk" or kind in record.name else f"{record.name} ({kind})"
        half = 0.048 * len(text) / _inches(axes)
        middle = min(max(((record.start + end) / 2 - line[0].start) / width, half), 1 - half)
        free = [row for row in (0, 1) if taken[row] <= middle - half]
        if not free:
            continue
        taken[free[0]] = middle + half + 0.01
        axes.annotate(
            text,
            (middle, 1),
            xycoords="axes fraction",
            xytext=(0, 6 + 14 * free[0]),
            textcoords="offset points",
            ha="center",
            fontsize=10,
            fontweight="bold",
            color=light("ink"),
        )


def curve_ends(line: Line, streams: Sequence[str]) -> Ends:
    """The ends of the held-out curves."""
    return [
        (points[-1].bits_per_byte, f"{shortened(stream)} {points[-1].bits_per_byte:.2f}", colour(index))
        for index, stream in enumerate(streams)
        if (points := curve(line, stream))
    ]


def _axes_width(line: Line, streams: Sequence[str], size: Size) -> float:
    """Width of the axes in inches, with room for what is written at the right."""
    if not size.ends:
        return size.width - LEFT - 0.08
    letters = max([12, *(len(text) for _, text, _ in curve_ends(line, streams))])
    return size.width - LEFT - (0.25 + 0.1 * letters)


def name_ends(axes: Axes, ends: Ends) -> None:
    """Write the name of each curve at its right end, far enough apart to be read and as near as that allows."""
    shown = sorted(end for end in ends if math.isfinite(end[0]))
    low, high = axes.get_ylim()
    gap = min((high - low) * 0.085, (high - low) / max(len(shown), 1))
    places = [min(max(value, low + gap / 2), high - gap / 2) for value, _, _ in shown]
    for i in range(1, len(places)):  # up as far as needed ...
        places[i] = max(places[i], places[i - 1] + gap)
    ceiling = high - gap / 2
    for i in reversed(range(len(places))):  # ... and back below the top
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    for place, (_, text, shade) in zip(places, shown, strict=True):
        axes.annotate(
            text,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=11,
            fontweight="bold",
            color=shade,
            annotation_clip=False,
        )


def title(axes: Axes, text: str) -> None:
    """Say in the corner of the axes what they show."""
    words = axes.text(0.99, 0.94, text, transform=axes.transAxes, ha="right", va="top", color=light("muted"))
    words.set_bbox({"facecolor": light("stage-0"), "alpha": 0.7, "linewidth": 0, "pad": 2})


def transient(line: Line) -> float:
    """Where the loss of a model that began without training has come near the scale of the rest."""
    first = line[0]
    return first.start + (TRANSIENT * (first.end - first.start) if first.ledger.parent is None else 0)


def settled(points: Sequence[EvalPoint], line: Line) -> Iterator[EvalPoint]:
    """The points behind the transient of a line."""
    limit = transient(line)
    return (point for point in points if point.tokens > limit or len(points) == 1)


def fit(axes: Axes, values: Sequence[float]) -> None:
    """Let the y axis show `values` with some room."""
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        low, high = min(finite), max(finite)
        room = 0.06 * max(high - low, 0.05 * abs(high), 1e-3)
        axes.set_ylim(low - room, high + room)


def smoothed(values: np.ndarray) -> np.ndarray:
    """A running mean over a 25th of the curve, of the values that are finite."""
    half = len(values) // 50
    finite = np.isfinite(values)
    sums, counts = (np.concatenate(([0.0], np.cumsum(x))) for x in (np.where(finite, values, 0.0), finite))
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((sums[high] - sums[low]) / (counts[high] - counts[low]))


def thinned(values: Sequence[_T], size: Size) -> list[_T]:
    """At most ``size.points`` points of a curve, the last one among them, and the first as near as that allows."""
    step = -(-max(len(values), 1) // size.points)
    return list(values[::-1][::step][::-1])


def apart(compare: Mapping[str, Line], line: Line) -> dict[str, list[RunRecord]]:
    """The runs of each compared line that are not in `line` too: those are drawn once."""
    own = {record.folder.resolve() for record in line}
    return {name: [record for record in other if record.folder.resolve() not in own] for name, other in compare.items()}
