"""A matplotlib figure as SVG inside a page: no scripts, no fonts, nothing to fetch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from io import BytesIO

import matplotlib as mpl
from matplotlib.figure import Figure

from megacpt.report.style import light, themed

_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: small, sharp, can be searched and read aloud
    "font.family": "DejaVu Sans",  # comes with matplotlib; the page's own font takes its place
    "font.size": 11,
    "axes.labelcolor": light("muted"),
    "axes.edgecolor": light("grid"),
    "text.color": light("ink"),
    "xtick.color": light("muted"),
    "ytick.color": light("muted"),
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Size:
    """How much room a figure has.

    Attributes:
        width: inches; the page scales it.
        points: of a curve at most; more would only make the page larger.
        ends: whether curves are named at their right ends; the page names them above where there is no room.
    """

    width: float
    points: int
    ends: bool


BROAD = Size(10.4, 1000, ends=True)
NARROW = Size(4.5, 250, ends=False)


def inline(name: str, description: str, draw: Callable[[Size], Figure]) -> str:
    """Draw a figure for broad and for narrow screens, and return both as ``<svg>``; the style sheet shows one.

    Args:
        name: letters that make the ids in this figure differ from those of others on the page.
        description: what is to be seen, for people who do not see it.
        draw: makes the figure for a size.
    """
    sizes = (("broad", BROAD), ("narrow", NARROW))
    return "".join(_svg(f"{name}-{kind}", kind, description, lambda: draw(size)) for kind, size in sizes)  # noqa: B023


def captioned(drawn: str, caption: str, names: str = "") -> str:
    """A figure with the words below it, and above it which name has which colour."""
    return f"<figure>{names}{drawn}<figcaption>{caption}</figcaption></figure>"


def _svg(name: str, kind: str, description: str, draw: Callable[[], Figure]) -> str:
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        buffer = BytesIO()
        draw().savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'^<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    label = escape(description, quote=True)
    return themed(text).replace("<svg ", f'<svg role="img" class="{kind}" aria-label="{label}" ', 1)
