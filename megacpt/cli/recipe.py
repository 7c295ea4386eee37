"""``megacpt recipe``: comparisons of papers at laptop size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Check the claims of papers at laptop size, over several seeds.")


@app.command("list")
def list_() -> None:
    """List the recipes that come with megacpt."""
    from rich.console import Console
    from rich.table import Table

    from megacpt.recipes.recipe import load_recipe, recipe_names

    table = Table("recipe", "what is compared", "runs a seed", "paper")
    for name in recipe_names():
        recipe = load_recipe(name)
        table.add_row(name, recipe.title, str(len(recipe.runs)), recipe.paper)
    Console().print(table)


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="A recipe of `megacpt recipe list`, or the path of a YAML file.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes of the recipe's constants, such as tokens=5M."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, each with other weights and data order.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder for texts, runs and results; by default megacpt-recipes/NAME.")
    ] = None,
) -> None:
    """Train the runs of a recipe, and say which sign was found, with a confidence interval over the seeds.

    Writes result.json and result.md. Runs that are done are skipped, so the same command goes on after a stop, and more
    seeds are added to those that are there.

    Examples:
      megacpt recipe run infinite-vs-cosine
      megacpt recipe run infinite-vs-cosine --seeds 5 tokens=5M --out long
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from megacpt.cli.train import STOPPED_EARLY
    from megacpt.recipes.execute import execute
    from megacpt.recipes.recipe import load_recipe
    from megacpt.recipes.result import collect, finding_rows, write_result
    from megacpt.runtime.layout import stop_process_group

    recipe = load_recipe(name, changes or [])
    folder = out or Path("megacpt-recipes") / recipe.name
    torch.set_num_threads(1)  # models this small gain nothing from more
    console = Console(stderr=True, highlight=False)
    done = execute(recipe, folder, seeds, console.print)
    stop_process_group()
    if done is None:
        console.print("stopped and saved; the same command goes on from here")
        raise typer.Exit(STOPPED_EARLY)
    result = collect(recipe, done)
    write_result(result, folder)
    table = Table("comparison", "claimed", "found", "95 % interval", "verdict", title=recipe.title)
    for row in finding_rows(result):
        table.add_row(*row)
    Console().print(table)
    console.print(f"all numbers: {folder / 'result.md'} and result.json")
