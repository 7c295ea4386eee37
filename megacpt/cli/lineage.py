"""``megacpt lineage``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(help="What checkpoints have seen, and how they descend from each other.", no_args_is_help=True)
Paths = Annotated[list[Path], typer.Argument(metavar="PATH...", help="Runs, checkpoints, or folders that hold some.")]


@app.command()
def show(
    paths: Paths,
    brief: Annotated[bool, typer.Option("--brief", help="A line a stage.")] = False,
) -> None:
    """Print the tree of runs: each stage, its tokens by stream, its schedule and where it stands.

    The longest line of descent goes straight down, and side branches stand to its right. Runs are linked by the ids of
    their ledgers, so that folders may have moved; stages whose runs are in none of the folders are drawn from what
    their descendants know.

    Examples:
      megacpt lineage show runs
      megacpt lineage show runs /archive/2024/runs --brief
    """
    from megacpt.continuation.lineage.forest import grow_forest
    from megacpt.continuation.lineage.tree import Drawing

    forest = grow_forest(paths)
    Console(highlight=False).print(Drawing(forest, brief))
    forest.complain()


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint, or the folder of a run for its newest.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Say what differs between two checkpoints: where their lines part, what each read alone, and how.

    Examples:
      megacpt lineage diff runs/python runs/python-release
      megacpt lineage diff runs/english/checkpoints/step-00001000 runs/english
    """
    from megacpt.continuation.lineage.beside import draw_diff
    from megacpt.continuation.lineage.diff import compare
    from megacpt.data.files import write_json

    found = compare(a, b)
    console = Console(highlight=False)
    for part in draw_diff(found):
        console.print(part)
    if json_file is not None:
        write_json(json_file, found.to_dict())


@app.command()
def verify(
    paths: Paths,
    quick: Annotated[
        bool, typer.Option("--quick", help="Compare sizes and shares only: read no stream, locate no sample.")
    ] = False,
    data: Annotated[
        list[Path] | None, typer.Option(help="A folder to look for moved streams in; may be given several times.")
    ] = None,
) -> None:
    """Prove what ledgers claim: ids, parents, streams on disk, and every token count from the samples themselves.

    Each stream is read once and its hash compared; each sample of each stage is located again and counted. Ends with
    status 2 and the names of what is wrong.

    Examples:
      megacpt lineage verify runs
      megacpt lineage verify runs --quick --data /archive/streams
    """
    from rich.progress import Progress

    from megacpt.continuation.lineage.verify import Bars
    from megacpt.continuation.lineage.verify import verify as prove
    from megacpt.errors import CheckpointError

    with Progress(console=Console(stderr=True), transient=True) as bars:
        verdict = prove(paths, quick, data or [], Bars(bars))
    console = Console(highlight=False)
    for text in verdict.proven:
        console.print(f"[green]proven[/green]    {escape(text)}", soft_wrap=True)
    for text in verdict.unproven:
        console.print(f"[yellow]unproven[/yellow]  {escape(text)}", soft_wrap=True)
    if verdict.wrong:
        raise CheckpointError("not everything is as the ledgers say:\n  " + "\n  ".join(verdict.wrong))


@app.command()
def export(
    paths: Paths,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write to this file instead of to the terminal.")
    ] = None,
) -> None:
    """Write the whole forest as JSON: every run and stage, its parent, its streams, its checkpoints.

    docs/lineage.md describes the keys. The same forest gives the same text.

    Examples:
      megacpt lineage export runs --json lineage.json
      megacpt lineage export runs | jq '.nodes[] | {folder, id, tokens}'
    """
    from megacpt.continuation.lineage.export import export as export_forest
    from megacpt.data.files import write_json

    content = export_forest(paths)
    if json_file is None:
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        write_json(json_file, content)
