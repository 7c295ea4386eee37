"""``megacpt report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folders, or folders that hold them; the runs they descend from are drawn too.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="The page to write; report.html in the first RUN if left out."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE.json", help="Write the same as JSON, for programs.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page; by default the names of the stages.")] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=RUN", help="Another line of runs, drawn beside; may be given several times."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="What the runs are called beside the compared ones.")] = None,
) -> None:
    """Write a page about a lineage: what was learned, what was forgotten, and how the training went.

    The page is one file with plots and tables, and needs no network. Branches among the runs are drawn beside the
    longest line of descent. docs/forgetting.md explains its numbers.

    Examples:
      megacpt report runs/python
      megacpt report runs/python --out report.html --json report.json
      megacpt report runs/python --out report.html --label "replay 25 %" --compare "replay 0 %=runs/python-0"
    """
    from megacpt.errors import CheckpointError, ConfigError
    from megacpt.report import write_report

    lines: dict[str, list[Path]] = {}
    for text in compare or []:
        name, equals, run = text.rpartition("=")
        if not (name and equals and run):
            raise ConfigError(f'--compare {text}: write NAME=RUN, such as "replay 0 %=runs/python-0"')
        lines.setdefault(name, []).append(Path(run))
    if not runs[0].is_dir():
        raise CheckpointError(f"{runs[0]} is no folder: give a run folder")
    typer.echo(write_report(runs, out or runs[0] / "report.html", title, lines, label, json))
