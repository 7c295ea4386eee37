"""The training loss, the rate and the throughput."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megacpt.report.figures.frame import Line, fit, name_ends, panels, smoothed, thinned, title, transient
from megacpt.report.style import light
from megacpt.report.svg import Size
from megacpt.report.words import short_rate, short_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def training_figure(line: Line, streams: Sequence[str], size: Size) -> Figure:
    """Draw training loss, learning rate and throughput below one another, against tokens of the lineage.

    Args:
        line: the line of runs, oldest first.
        streams: their held-out streams; the axes are as wide as in the figure of those.
        size: the room there is.
    """
    figure, (loss, rate, speed) = panels(line, streams, size, [2.4, 1.1, 0.9])
    clear: list[float] = []
    for record in line:
        if not record.train:
            continue
        tokens, losses, rates, speeds = (
            np.array([getattr(point, key) for point in record.train])
            for key in ("tokens", "loss", "rate", "tokens_per_second")
        )
        first = transient(line) if record is line[0] else record.start
        clear += [float(value) for value in losses[tokens > first]]
        _plot(loss, tokens, losses, size, "train", 1.0, alpha=0.3)
        _plot(loss, tokens, smoothed(losses), size, "train", 2.0)
        _plot(rate, tokens, rates, size, "ink", 1.6)
        _plot(speed, tokens, speeds, size, "train", 1.0, alpha=0.3)
        _plot(speed, tokens, smoothed(speeds), size, "train", 1.6)
    fit(loss, clear)
    for axes, text in ((loss, "training loss, nats a token"), (rate, "learning rate"), (speed, "tokens a second")):
        title(axes, text)
        if axes is not loss:
            axes.set_ylim(0, (1.3 if axes is rate else 1.6) * axes.get_ylim()[1])  # room for the words
            axes.yaxis.set_major_locator(MaxNLocator(3))
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_rate(value)))
    speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_tokens(round(value))))
    if size.ends and (last := line[-1].train):
        ended = float(smoothed(np.array([point.loss for point in last]))[-1])
        name_ends(loss, [(ended, f"loss {ended:.2f}", light("train"))])
        name_ends(rate, [(last[-1].rate, f"rate {short_rate(last[-1].rate)}", light("ink"))])
    return figure


def _plot(
    axes: Axes, tokens: np.ndarray, values: np.ndarray, size: Size, shade: str, width: float, alpha: float = 1.0
) -> None:
    chosen = thinned(range(len(tokens)), size)
    axes.plot(tokens[chosen], values[chosen], color=light(shade), linewidth=width, alpha=alpha)
