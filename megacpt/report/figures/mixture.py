"""The shares of the streams in the mixture, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from megacpt.report.figures.frame import Line, panels
from megacpt.report.shares import Mixture
from megacpt.report.style import colour, light
from megacpt.report.svg import Size
from megacpt.report.words import percent

REPLAY = 0.45  # how strongly replay is drawn


def mixture_figure(
    line: Line, streams: Sequence[str], mixed: Sequence[Mixture], colours: Mapping[str, int], size: Size
) -> Figure:
    """Draw the shares of the streams as bands against tokens of the lineage; replay is fainter.

    Args:
        line: the line of runs, oldest first.
        streams: their held-out streams; the axes are as wide as in the figure of those.
        mixed: the mixture of each stage.
        colours: number of the colour of each stream.
        size: the room there is.
    """
    figure, (axes,) = panels(line, streams, size, [1.5])
    for mixture in mixed:
        tokens = [place for place, _ in mixture.points]
        low = [0.0] * len(tokens)
        for number, (stream, replayed) in enumerate(zip(mixture.streams, mixture.replayed, strict=True)):
            high = [below + shares[number] for below, (_, shares) in zip(low, mixture.points, strict=True)]
            shade, strength = colour(colours[stream]), REPLAY if replayed else 0.95
            axes.fill_between(tokens, low, high, color=shade, alpha=strength, linewidth=0, zorder=2)
            axes.plot(tokens, high, color=light("ground"), linewidth=0.8, zorder=3)
            low = high
    for record in line[1:]:
        axes.axvline(record.start, color=light("ground"), linewidth=2, zorder=4)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    return figure
