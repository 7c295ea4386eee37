"""``megacpt demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for texts, streams, runs and the report.")] = Path("megacpt-demo"),
    replay: Annotated[float, typer.Option(min=0.0, max=0.99, help="Share of replayed samples.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 1234,
    tokens: Annotated[str, typer.Option(help="Length of the first stage; the second is half of it.")] = "2M",
) -> None:
    """Continue a model on new text, with and without replay, and see what it forgets.

    Trains a small model on English (the documentation of Python), continues it on Python source with replay, anneals a
    release, and does the same without replay beside it: all from text that is on this machine, in a few minutes on two
    cores. Called again after an interruption it goes on where it was.

    Examples:
      megacpt demo
      megacpt demo --replay 0.05 --out /tmp/little-replay
    """
    from rich.console import Console

    from megacpt.cli.train import STOPPED_EARLY
    from megacpt.config import Tokens
    from megacpt.demo.run import demo as run_demo
    from megacpt.demo.run import next_commands
    from megacpt.runtime.layout import stop_process_group

    result = run_demo(out, replay, seed, int(Tokens.parse(tokens)))
    stop_process_group()
    console = Console(stderr=True)
    if not result.complete:
        console.print("stopped and saved; the same command goes on from here")
        raise typer.Exit(STOPPED_EARLY)
    console.print(f"\nReport with the curves: {result.page}", highlight=False)
    console.print(f"TensorBoard: tensorboard --logdir {out / 'runs'}", highlight=False)
    console.print("\n[bold]With your own text, next:[/bold]")
    for command in next_commands(out, result.runs):
        console.print(f"  {command}", highlight=False, soft_wrap=True)
