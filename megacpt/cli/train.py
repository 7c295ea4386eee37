"""``megacpt train``, ``continue`` and ``anneal``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from megacpt.config import RunConfig

# Slurm and torchrun scripts queue a run again on this status (EX_TEMPFAIL of sysexits.h).
STOPPED_EARLY = 75
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as optim.peak_lr=3e-4 parallel.tensor=2."),
]


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file, or the folder of a run.")],
    overrides: Overrides = None,
) -> None:
    """Start a run, or resume it exactly where it stopped.

    The same command does both: if the run folder holds a checkpoint, the run goes on from the newest good one and ends
    with the weights it would have had without the stop. The layout, the microbatch size, logging and saving may differ.
    Ctrl-C or SIGTERM finishes the step, saves, and exits with status 75.

    Examples:
      megacpt train configs/runs/english.yaml
      megacpt train configs/runs/english.yaml optim.peak_lr=1e-3 run=runs/hot
      torchrun --standalone --nproc-per-node 4 -m megacpt train configs/runs/english.yaml parallel.tensor=2
    """
    from megacpt.config import load_run

    file = run / "run.yaml" if run.is_dir() else run
    _run(lambda: (load_run(file, overrides or []), None))


def continue_(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run for its newest.")],
    stage: Annotated[Path, typer.Argument(metavar="STAGE.yaml", help="The new stage.")],
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the new run; needed unless STAGE.yaml names it.")] = None,
) -> None:
    """Begin a new stage from a checkpoint, in a run folder of its own.

    Everything that STAGE.yaml does not name is as in the checkpoint's run. Weights and optimizer go on; under the
    infinite schedule so does the rate. Called again after a stop, the command resumes the new run.

    Examples:
      megacpt continue runs/english configs/stages/python.yaml --run runs/python
      megacpt continue runs/english configs/stages/python.yaml --run runs/python-50 stage.replay.share=50%
    """
    from megacpt.continuation.boundary import continued_config

    _run(lambda: continued_config(checkpoint, stage, run, overrides or []))


def anneal(
    checkpoint: Annotated[Path, typer.Argument(help="A trunk's checkpoint, or its run folder for the newest.")],
    run: Annotated[Path, typer.Option(help="Folder of the branch.")],
    tokens: Annotated[str, typer.Option(help="Length: a percentage of the trunk's stage, steps, or tokens.")] = "10%",
    overrides: Overrides = None,
) -> None:
    """Make a release: a branch on the trunk's mixture whose rate goes down to the end.

    The trunk is left as it is; later stages continue from it, not from the branch.

    Examples:
      megacpt anneal runs/python --tokens 10% --run runs/python-release
    """
    from megacpt.continuation.boundary import annealed_config

    _run(lambda: annealed_config(checkpoint, tokens, run, overrides or []))


def _run(configure: Callable[[], tuple[RunConfig, Any]]) -> None:
    """Train what `configure` describes, and say where the result is."""
    config, parent = configure()  # first, so that a mistake is told before anything heavy is loaded

    from megacpt.runtime.layout import is_first_rank, stop_process_group
    from megacpt.train.run import train as run_training

    outcome = run_training(config, parent)
    if is_first_rank():
        state = "complete" if outcome.complete else "stopped early; the same command goes on"
        Console(stderr=True).print(f"{state}: {outcome.checkpoint}", highlight=False)
    stop_process_group()
    if not outcome.complete:
        raise typer.Exit(STOPPED_EARLY)
