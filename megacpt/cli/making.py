"""What commands share that make files and folders out of weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or the folder of a run for its newest.")
]

Destination = Annotated[Path | None, typer.Argument(metavar="DST", help="What is made; the same as --out.")]
NewRun = Annotated[Path | None, typer.Option(help="A new folder; `eval`, `generate` and `continue` open it as a run.")]


class Dtype(str, Enum):
    """Of weights that are not quantised."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def place(destination: Path | None, out: Path | None) -> Path:
    """Return where to write, named as the second word or with ``--out``.

    Raises:
        ConfigError: it is named twice, or not at all.
    """
    from megacpt.errors import ConfigError

    if destination is not None and out is not None:
        raise ConfigError(f"--out {out}: what is made is named already, {destination}: remove one of both")
    found = out if destination is None else destination
    if found is None:
        raise ConfigError("say where to write: a second path, or --out")
    return found


@contextmanager
def exporting(out: Path, what: str, shared: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on the first rank while the block runs, and the name of what it made; `shared`: by all ranks."""
    from rich.console import Console
    from rich.progress import Progress

    from megacpt.errors import LayoutError
    from megacpt.runtime.layout import is_first_rank, start_process_group, stop_process_group, world_size

    start_process_group()
    if world_size() > 1 and not shared:
        raise LayoutError(f"this command is of one process, and here are {world_size()} ranks: run it without torchrun")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not is_first_rank()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, count: bar.update(task, completed=done, total=-(-count // world_size()))
    if is_first_rank():
        console.print(f"made: {out}", highlight=False)
    stop_process_group()


def verified(run: Path, folder: Path, out: Path) -> None:
    """Compare a run with the model of Hugging Face that it was made of, or that was made of it.

    Args:
        run: of the checkpoint.
        folder: of Hugging Face.
        out: which of both was made; it goes if they are not the same function.

    Raises:
        CheckpointError: they are not.
    """
    from rich.console import Console

    from megacpt.convert.verification import obstacle, verify
    from megacpt.errors import CheckpointError
    from megacpt.runtime.layout import stop_process_group

    console = Console(stderr=True)
    if (why := obstacle(run)) is not None:
        if os.environ.get("RANK", "0") == "0":
            console.print(f"not verified: {why}", highlight=False)
        return
    try:
        with console.status("comparing with transformers"):
            card = verify(run, folder, out)
    except CheckpointError:
        shutil.rmtree(out, ignore_errors=True)
        raise
    console.print(card.line(), highlight=False)
    stop_process_group()
