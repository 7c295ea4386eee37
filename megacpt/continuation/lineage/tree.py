"""The forest of runs as a drawing for a terminal.

Each tree has a main line, its longest line of descent, which goes straight down; side branches stand to its right.
So a lineage of many stages is as wide as its branches are nested, not as its stages are many.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.text import Text

from megacpt.continuation.lineage.describe import describe, shares, standing
from megacpt.continuation.lineage.forest import Forest, Node
from megacpt.continuation.lineage.words import short_tokens

_PLAIN = str.maketrans("│├─●◐○◌◆", "||-*o.?#")  # where a terminal knows ASCII only
_LEAST = 24  # columns that text gets, however far to the right it stands


@dataclass(frozen=True)
class _Place:
    """Where a node is drawn: what stands left of its first line, of its other lines, and of what follows below."""

    node: Node
    left: str
    rest: str


class Drawing:
    """A forest, drawn as wide as the console is.

    Args:
        forest: what to draw.
        brief: a line a stage instead of a block.
    """

    def __init__(self, forest: Forest, brief: bool = False) -> None:
        self._trees = [list(_places(root)) for root in forest.roots]
        self._brief = brief

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines, wrapped (brief ones: cut) inside their place in the drawing."""
        rows = self._one_line_each() if self._brief else self._blocks()
        for left, below, text in rows:
            room = max(_LEAST, options.max_width - max(len(left), len(below)))
            lines = list(text.wrap(console, room))
            if self._brief and len(lines) > 1:
                text.truncate(room, overflow="ellipsis")
                lines = [text]
            for number, line in enumerate(lines):
                line.rstrip()
                gutter = below if number else left
                yield Segment(gutter.translate(_PLAIN) if options.ascii_only else gutter, console.get_style("dim"))
                yield line

    def _blocks(self) -> Iterator[tuple[str, str, Text]]:
        for number, tree in enumerate(self._trees):
            if number:
                yield "", "", Text()
            for place in tree:
                head, *lines = describe(place.node)
                yield place.left, place.rest + "  ", head
                yield from ((place.rest, place.rest + "  ", line) for line in lines)

    def _one_line_each(self) -> Iterator[tuple[str, str, Text]]:
        """Columns: folder, tokens of the stage, tokens of the lineage, how far it is, shares of the streams."""
        places = [place for tree in self._trees for place in tree]
        names = _short_names([place.node for place in places])
        left = max(len(place.left) + len(names[place.node]) for place in places)
        state = max(len(standing(place.node, brief=True)) for place in places)
        yield "", "", Text(f"{'run':<{left}}  tokens  in all  {'':<{state}}  streams", "dim")
        for place in places:
            node, name = place.node, names[place.node]
            columns = [
                " " * (left - len(place.left) - len(name)),
                f"{short_tokens(node.stage.tokens):>6}",
                f"{short_tokens(node.ledger.tokens):>6}",
                f"{standing(node, brief=True):<{state}}",
                shares(node),
            ]
            yield place.left, "", Text.assemble((name, "bold"), "  ".join(columns))


def _places(root: Node) -> Iterator[_Place]:
    """Yield every node of a tree, side branches before the main line that they leave."""
    # (node, what stands left of its first line, and of all that is drawn below it)
    waiting = [(root, "", "")]
    while waiting:
        node, left, below = waiting.pop()
        main = max(node.children, key=_prominence, default=None)
        yield _Place(node, f"{left}{_mark(node)} ", below + ("  " if main is None else "│ "))
        if main is not None:
            waiting.append((main, below, below))
            sides = [child for child in node.children if child is not main]
            waiting += [(child, below + "├─", below + "│ ") for child in reversed(sides)]


def _prominence(node: Node) -> tuple[int, bool, int]:
    """Of several children that goes straight on: the longest line, a trunk rather than a release, the most tokens."""
    depth, level = 0, node.children
    while level:
        depth, level = depth + 1, [child for node in level for child in node.children]
    return depth, node.stage.kind != "anneal", node.ledger.tokens


def _mark(node: Node) -> str:
    if node.folder is None:
        return "◌"
    if node.ledger.derived is not None:
        return "◆"
    if not node.stage.steps:
        return "○"
    return "●" if node.steps is None or node.stage.steps >= node.steps else "◐"


def _short_names(nodes: list[Node]) -> dict[Node, str]:
    """Return the folders of nodes without what all of them have in common; of missing ones the name of the stage."""
    folders = [str(node.folder.absolute().parent) for node in nodes if node.folder is not None]
    common = os.path.commonpath(folders) if folders else ""
    return {
        node: f"({node.stage.name})" if node.folder is None else os.path.relpath(node.folder.absolute(), common)
        for node in nodes
    }
