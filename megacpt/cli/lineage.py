"""``megacpt lineage``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="What checkpoints have seen, and how they descend from each other.", no_args_is_help=True)


@app.command()
def show(
    paths: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold run folders.")],
) -> None:
    """Print the tree of runs: each stage, its tokens by stream, its schedule and where it stands.

    Examples:
      megacpt lineage show runs
    """
    from rich.console import Console

    from megacpt.continuation.tree import lineage_tree

    Console().print(lineage_tree(paths))
