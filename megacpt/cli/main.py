"""The commands, and what happens to an error on its way to the user."""

from __future__ import annotations

import logging
import os
import sys

import typer
from rich.console import Console
from rich.logging import RichHandler

from megacpt.cli import config, convert, data, lineage, recipe, train
from megacpt.cli.bench import app as bench
from megacpt.cli.demo import demo
from megacpt.cli.doctor import doctor
from megacpt.cli.evaluate import evaluate, flips
from megacpt.cli.generate import generate
from megacpt.cli.report import report
from megacpt.errors import MegacptError

# OpenMP threads that wait spin for a while before they sleep. By default they spin so long that a step takes ten times
# as long when another program wants a core too; it has to be said before torch loads OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

app = typer.Typer(
    name="megacpt",
    help="Continue a model on new token streams, at any scale, without forgetting.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
)
app.command()(demo)
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")
app.command()(train.train)
app.command("continue")(train.continue_)
app.command()(train.anneal)
app.command("eval")(evaluate)
app.command()(flips)
app.command()(generate)
app.add_typer(lineage.app, name="lineage")
app.command()(report)
app.add_typer(convert.app, name="convert")
app.add_typer(bench, name="bench")
app.add_typer(recipe.app, name="recipe")
app.command()(doctor)


def main() -> None:
    """Run a command; a mistake of the user's ends with its message and status 2, without a traceback."""
    first = os.environ.get("RANK", "0") == "0"
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    try:
        app()
    except MegacptError as error:
        if first:
            Console(stderr=True).print("[bold red]error:[/bold red]", end=" ")
            print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
