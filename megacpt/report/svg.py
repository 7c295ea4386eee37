"""A matplotlib figure as SVG inside a page: no scripts, no fonts, nothing to fetch."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from io import BytesIO

import matplotlib as mpl
from matplotlib.figure import Figure

from megacpt.report.style import INK, MUTED

_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: small, sharp, can be searched and read aloud
    "font.family": "DejaVu Sans",  # comes with matplotlib; the page's own font takes its place
    "font.size": 11,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#aab1bd",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def inline(name: str, description: str, draw: Callable[[], Figure]) -> str:
    """Draw a figure and return it as an ``<svg>`` element.

    Args:
        name: letters that make the ids in this figure differ from those of others on the page.
        description: what is to be seen, for people who do not see it.
        draw: makes the figure.
    """
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        buffer = BytesIO()
        draw().savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'^<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description, quote=True)}" ', 1)
