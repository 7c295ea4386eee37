"""The curves of a report: held-out loss by stream, and training loss above the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megacpt.report.outcome import curve
from megacpt.report.record import EvalPoint, RunRecord
from megacpt.report.style import COMPARED, INK, MUTED, STAGE_SHADES, TRAIN, DashStyle, colour
from megacpt.report.words import short_rate, short_tokens, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = Sequence[RunRecord]

WIDTH = 10.4  # inches; the page scales it
LEFT = 0.055  # of the width, for the numbers of the y axis
MOST_POINTS = 1200  # of a curve; more would only make the page larger
TRANSIENT = 0.04  # of a first stage: a model without training would stretch the scale beyond use


def held_out_figure(line: Line, streams: Sequence[str], label: str, compare: Mapping[str, Line]) -> Figure:
    """Draw bits a byte of each held-out stream against tokens of the lineage, with other lines beside.

    Args:
        line: the line of runs, oldest first.
        streams: their held-out streams; the order decides the colours.
        label: what `line` is called beside others.
        compare: other lines by name; runs that they share with `line` are drawn once.
    """
    figure = Figure(figsize=(WIDTH, 4.4))
    ends = _ends(line, streams)
    axes = figure.add_axes((LEFT, 0.13, _width(ends), 0.76))
    own = {record.folder.resolve() for record in line}
    shown: list[EvalPoint] = []
    for index, stream in enumerate(streams):
        points = curve(line, stream)
        shown += _settled(points, line)
        _plot_curve(axes, points, colour(index), "-", 2.2)
        for number, other in enumerate(compare.values()):
            apart = [record for record in other if record.folder.resolve() not in own]
            beside = curve(apart, stream)
            shown += _settled(beside, other)
            _plot_curve(axes, beside, colour(index), COMPARED[number % len(COMPARED)], 1.5)
    last = max([line[-1].end, *(other[-1].end for other in compare.values())])
    _frame(axes, line, last)
    _fit(axes, [point.bits_per_byte for point in shown])
    _name_ends(axes, ends)
    if compare:
        _name_lines(axes, [label, *compare])
    return figure


def training_figure(line: Line, streams: Sequence[str]) -> Figure:
    """Draw the training loss, and below it the learning rate, against tokens of the lineage.

    The axes are as wide as in the figure of the held-out `streams`, so that both can be read together.
    """
    figure = Figure(figsize=(WIDTH, 5.0))
    width = _width(_ends(line, streams))
    loss = figure.add_axes((LEFT, 0.41, width, 0.49))
    rate = figure.add_axes((LEFT, 0.11, width, 0.24), sharex=loss)
    settled = []
    for record in line:
        tokens, values = (np.array([getattr(p, key) for p in record.train]) for key in ("tokens", "loss"))
        if not len(tokens):
            continue
        first = _transient(line) if record is line[0] else record.start
        settled += [float(value) for value in values[tokens > first]]
        loss.plot(*_thinned(tokens, values), color=TRAIN, alpha=0.25, linewidth=1.0)
        loss.plot(*_thinned(tokens, _smoothed(values)), color=TRAIN, linewidth=2.0)
        rate.plot(*_thinned(tokens, np.array([p.rate for p in record.train])), color=INK, linewidth=1.6)
    _frame(loss, line, line[-1].end)
    _frame(rate, line, line[-1].end, named=False)
    for axes, text in ((loss, "training loss, nats a token"), (rate, "learning rate")):
        axes.text(0.99, 0.94, text, transform=axes.transAxes, ha="right", va="top", color=MUTED)
    loss.tick_params(labelbottom=False)
    loss.set_xlabel("")
    _fit(loss, settled)
    rate.set_ylim(bottom=0)
    if line[-1].train:
        ended = float(_smoothed(np.array([p.loss for p in line[-1].train]))[-1])
        _name_ends(loss, [(ended, f"loss {ended:.2f}", TRAIN)])
        _name_end(rate, line[-1].train[-1].rate, f"rate {short_rate(line[-1].train[-1].rate)}", INK)
    rate.yaxis.set_major_locator(MaxNLocator(3))
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_rate(value)))
    return figure


def _plot_curve(axes: Axes, points: Sequence[EvalPoint], shade: str, style: DashStyle, width: float) -> None:
    points = _every(points)
    axes.plot(
        [point.tokens for point in points],
        [point.bits_per_byte for point in points],
        color=shade,
        linestyle=style,
        linewidth=width,
        marker="o" if style == "-" and len(points) <= 60 else None,
        markersize=3.5,
        solid_joinstyle="round",
    )


def _frame(axes: Axes, line: Line, last: int, named: bool = True) -> None:
    """Shade and name the stages, and give the axes their quiet look."""
    first = line[0].start
    axes.set_xlim(first, max(last, first + 1))
    for number, record in enumerate(line):
        end = line[number + 1].start if number + 1 < len(line) else max(record.end, last)
        axes.axvspan(record.start, end, color=STAGE_SHADES[number % 2], zorder=0, linewidth=0)
        if number:
            axes.axvline(record.start, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    if named:
        _name_stages(axes, line, last)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#d9dce1", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5)
    axes.set_xlabel("tokens of the lineage", loc="left")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_tokens(round(value))))


def _name_stages(axes: Axes, line: Line, last: int) -> None:
    """Write the names of the stages above the plot, in a second row where they are narrow; the tables name them all."""
    width = max(last - line[0].start, 1)
    taken = [-math.inf, -math.inf]  # right end of the last name in each row, as a share of the width
    for number, record in enumerate(line):
        end = line[number + 1].start if number + 1 < len(line) else last
        kind = record.ledger.stage.kind
        text = record.name if kind == "trunk" or kind in record.name else f"{record.name} ({kind})"
        half = 0.0055 * len(text)
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
            color=INK,
        )


def _ends(line: Line, streams: Sequence[str]) -> list[tuple[float, str, str]]:
    """Where the curves of the streams end, what is written there, and in which colour."""
    return [
        (points[-1].bits_per_byte, f"{shortened(stream)} {points[-1].bits_per_byte:.2f}", colour(index))
        for index, stream in enumerate(streams)
        if (points := curve(line, stream))
    ]


def _width(ends: Sequence[tuple[float, str, str]]) -> float:
    """Width of the axes as a share of the figure's, with room for what is written at the right."""
    letters = max([12, *(len(text) for _, text, _ in ends)])
    return 1 - LEFT - (0.25 + 0.1 * letters) / WIDTH


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write the name of each curve at its right end, far enough apart to be read."""
    low, high = axes.get_ylim()
    gap, below = (high - low) * 0.085, -math.inf
    for value, text, shade in sorted(end for end in ends if math.isfinite(end[0])):
        place = max(min(value, high - gap * 0.5), below + gap)
        below = place
        _name_end(axes, place, text, shade)


def _name_end(axes: Axes, place: float, text: str, shade: str) -> None:
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


def _name_lines(axes: Axes, labels: Sequence[str]) -> None:
    styles = ["-", *(COMPARED[i % len(COMPARED)] for i in range(len(labels) - 1))]
    handles = [
        Line2D([], [], color=INK, linestyle=style, linewidth=2.0 if i == 0 else 1.5, label=label)
        for i, (style, label) in enumerate(zip(styles, labels, strict=True))
    ]
    axes.legend(
        handles=handles,
        loc="upper right",
        bbox_to_anchor=(1.0, -0.055),
        ncols=len(labels),
        frameon=False,
        fontsize=10,
        handlelength=2.6,
    )


def _transient(line: Line) -> float:
    """Where the loss of a model that began without training has come near the scale of the rest."""
    first = line[0]
    return first.start + (TRANSIENT * (first.end - first.start) if first.ledger.parent is None else 0)


def _settled(points: Sequence[EvalPoint], line: Line) -> Iterator[EvalPoint]:
    limit = _transient(line)
    return (point for point in points if point.tokens > limit or len(points) == 1)


def _fit(axes: Axes, values: Sequence[float]) -> None:
    """Let the y axis show `values` with some room."""
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        low, high = min(finite), max(finite)
        room = 0.06 * max(high - low, 0.05 * abs(high), 1e-3)
        axes.set_ylim(low - room, high + room)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """A running mean over a 25th of the curve, of the values that are finite."""
    half = len(values) // 50
    finite = np.isfinite(values)
    sums, counts = (np.concatenate(([0.0], np.cumsum(x))) for x in (np.where(finite, values, 0.0), finite))
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((sums[high] - sums[low]) / (counts[high] - counts[low]))


def _thinned(tokens: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points of a curve, the last one among them."""
    step = -(-len(tokens) // MOST_POINTS)
    chosen = np.arange(len(tokens) - 1, -1, -step)[::-1]
    return tokens[chosen], values[chosen]


def _every(points: Sequence[EvalPoint]) -> Sequence[EvalPoint]:
    step = -(-max(len(points), 1) // MOST_POINTS)
    return points[::-1][::step][::-1]
