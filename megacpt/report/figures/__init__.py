"""The figures of a report, drawn by matplotlib for broad and for narrow screens."""

from __future__ import annotations

from megacpt.report.figures.gaps import gap_figure
from megacpt.report.figures.held_out import held_out_figure
from megacpt.report.figures.mixture import mixture_figure
from megacpt.report.figures.training import training_figure

__all__ = ["gap_figure", "held_out_figure", "mixture_figure", "training_figure"]
