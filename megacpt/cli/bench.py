"""``megacpt bench``: how fast it is, beside peers, and since when."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megacpt.bench.result import BenchResult

app = typer.Typer(no_args_is_help=True, help="Measure speed beside peers, and compare measurements.")


@app.command()
def step(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN.yaml] [KEY=VALUE]...",
            help="The run to measure, and changes such as `batch.microbatch=4`.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A model of configs/models instead; by default one of 10M parameters."),
    ] = None,
    blocks: Annotated[int, typer.Option(min=2, help="Blocks of steps for each side; more narrow the interval.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; by default its own choice.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")
    ] = None,
) -> None:
    """Measure a training step beside a plain PyTorch loop of the same model.

    Both start from the same weights, see the same random tokens and take turns, so that whatever else the machine does
    hits both. The ratio comes with the interval that holds 95 % of its bootstrap resamples.

    Examples:
      megacpt bench step
      megacpt bench step --model tiny batch.seq_length=512 --json tiny.json
      megacpt bench step configs/runs/english.yaml precision=bfloat16
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from megacpt.bench.step import bench_config, bench_step

    given = arguments or []
    files = [Path(text) for text in given if "=" not in text]
    if len(files) > 1:
        raise typer.BadParameter(f"one run file at a time, not {' and '.join(map(str, files))}")
    config = bench_config(files[0] if files else None, model, [text for text in given if "=" in text])
    if threads is not None:
        torch.set_num_threads(threads)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("engine and plain loop, in turns", total=blocks)
        result = bench_step(config, blocks, lambda done, _: progress.update(task, completed=done))
    _print_step(result)
    if json_file is not None:
        result.write(json_file)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="A result of `megacpt bench ... --json`.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="Another, of the same benchmark.")],
) -> None:
    """Say what is faster or slower in B than in A by more than the noise, and what else differs.

    Examples:
      megacpt bench compare main.json branch.json
    """
    from rich.console import Console
    from rich.table import Table

    from megacpt.bench.compare import compare as run
    from megacpt.bench.result import read_result

    found = run(read_result(before), read_result(after))
    console = Console()
    table = Table("", "A", "B", "B / A", "95 % interval", "")
    for change in found.changes:
        spread = f"{change.ratio.low:.3f} to {change.ratio.high:.3f}"
        row = (change.name, _time(change.before), _time(change.after), f"{change.ratio.value:.3f}", spread)
        table.add_row(*row, change.verdict)
    console.print(table)
    if found.differences:
        others = Table("what differs", "A", "B")
        for key, old, new in found.differences:
            others.add_row(key, old, new)
        console.print(others)


def _print_step(result: BenchResult) -> None:
    from rich.console import Console
    from rich.table import Table

    from megacpt.bench.result import Interval
    from megacpt.bench.step import CPU, PASSES, TARGET

    table = Table("", "step", "middle half", PASSES, CPU, "tokens/s")
    for name in ("engine", "plain"):
        series = result.series[name]
        parts = (_time(result.series[f"{name}: {part}"].median) for part in (PASSES, CPU))
        spread = " to ".join(map(_time, series.quartiles))
        table.add_row(name, _time(series.median), spread, *parts, f"{series.work / series.median:,.0f}")
    machine, batch = result.machine, result.config["batch"]
    console = Console(highlight=False)
    console.print(
        f"{result.figures['parameters']:,.0f} parameters, {batch['sequences']} sequences of {batch['seq_length']} in "
        f"microbatches of {batch['microbatch']}, {result.config['precision']}; {machine.device}, "
        f"{machine.threads} thread{'s' * (machine.threads > 1)}, torch {machine.versions['torch']}",
        soft_wrap=True,
    )
    console.print(table)
    for name, remark in (
        ("engine / plain", f"; the aim is {TARGET} at most"),
        (f"engine / plain: {CPU}", ""),
    ):
        found = result.figures[name]
        assert isinstance(found, Interval)
        spread = f"95 % interval {found.low:.3f} to {found.high:.3f}"
        console.print(f"{name}: [bold]{found.value:.3f}[/bold] ({spread}{remark})", soft_wrap=True)
    if machine.load > machine.cores / 2:
        console.print(
            f"[yellow]the machine was busy (load {machine.load:g} on {machine.cores} cores): trust the processor time "
            "with --threads 1, or take more --blocks[/yellow]",
            soft_wrap=True,
        )


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
