"""``megacpt convert``: weights from other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Make checkpoints from checkpoints.")


@app.callback()
def _group() -> None:
    """Keep `average` a command of its own while it is the only one."""


@app.command()
def average(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINT...", help="Checkpoints, or folders of runs for their newest.")
    ],
    out: Annotated[Path, typer.Option(help="A new folder; `eval`, `generate` and `continue` open it as a run.")],
    last: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Take the last K checkpoints of the one run that is given.")
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="uniform; ema:ALPHA (each later checkpoint enters with this share, such as ema:0.2); or a number "
            "for each checkpoint, such as 1,2,3."
        ),
    ] = "uniform",
) -> None:
    """Average the weights of checkpoints of one model, oldest first.

    Nothing is gathered: every block of every tensor is read, averaged in float64 and written for itself, in whatever
    layouts the checkpoints were written. Under torchrun the ranks share the work. The result has no optimizer state:
    continuing it starts the moments afresh and has to re-warm.

    Examples:
      megacpt convert average runs/english --last 6 --weights ema:0.2 --out runs/english-mean
      megacpt convert average runs/a runs/b --weights 3,1 --out runs/a-and-b
    """
    from rich.console import Console
    from rich.progress import Progress

    from megacpt.convert.average import average as run
    from megacpt.convert.average import last_checkpoints
    from megacpt.errors import ConfigError
    from megacpt.runtime.layout import is_first_rank, start_process_group, stop_process_group, world_size

    if last is not None:
        if len(checkpoints) != 1:
            raise ConfigError(f"--last takes the checkpoints of one run, and {len(checkpoints)} folders are given")
        checkpoints = last_checkpoints(checkpoints[0], last)
    numbers = _weights(weights, len(checkpoints))
    start_process_group()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not is_first_rank()) as bar:
        task = bar.add_task(f"averaging {len(checkpoints)} checkpoints")

        def told(done: int, pieces: int) -> None:
            bar.update(task, completed=done, total=-(-pieces // world_size()))

        made = run(checkpoints, out, numbers, told)
    if is_first_rank():
        console.print(f"made: {made}", highlight=False)
    stop_process_group()


def _weights(text: str, count: int) -> list[float]:
    """Read ``--weights``."""
    from megacpt.convert.average import exponential, uniform
    from megacpt.errors import ConfigError

    if text == "uniform":
        return uniform(count)
    kind, _, share = text.partition(":")
    try:
        return exponential(count, float(share)) if kind == "ema" else [float(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--weights: '{text}' is not uniform, ema:ALPHA, or numbers such as 1,2,3") from error
