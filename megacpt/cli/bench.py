"""``megacpt bench``: how fast it is, beside peers, and since when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megacpt.cli.bench_convert import convert
from megacpt.cli.bench_ternary import ternary

if TYPE_CHECKING:
    from megacpt.bench.result import BenchResult, Interval

app = typer.Typer(no_args_is_help=True, help="Measure speed beside peers, and compare measurements.")
app.command()(convert)
app.command()(ternary)

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN.yaml] [KEY=VALUE]...", help="The run to measure, and changes such as `batch.microbatch=4`."
    ),
]
Blocks = Annotated[int, typer.Option(min=2, help="Blocks of steps for each side; more narrow the interval.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch; by default its own choice.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")]


@app.command()
def step(
    arguments: Arguments = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A model of configs/models instead; by default one of 10M parameters."),
    ] = None,
    blocks: Blocks = 10,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Measure a training step beside a plain PyTorch loop of the same model.

    Both start from the same weights, see the same random tokens and take turns, so that whatever else the machine does
    hits both. The ratio comes with the interval that holds 95 % of its bootstrap resamples.

    Examples:
      megacpt bench step
      megacpt bench step --model tiny batch.seq_length=512 --json tiny.json
      megacpt bench step configs/runs/english.yaml precision=bfloat16
    """
    from megacpt.bench.step import TARGET, bench_config, bench_step

    config = bench_config(_run_file(arguments), model, _changes(arguments))
    result = _in_turns("engine and plain loop", lambda heard: bench_step(config, blocks, heard), blocks, threads)
    _print_sides(result, "engine", "plain", TARGET)
    if json_file is not None:
        result.write(json_file)


@app.command()
def twin(
    arguments: Arguments = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A model of configs/models instead; by default one of 31 + 1 experts."),
    ] = None,
    blocks: Blocks = 10,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Measure the step of a model with experts beside its dense twin, in which a token costs the same FLOPs.

    Examples:
      megacpt bench twin
      megacpt bench twin batch.microbatch=4 model.moe.balance.kind=sinkhorn
      megacpt bench twin --model NAME --threads 1 --json twin.json
    """
    from megacpt.bench.twin import TARGET, bench_twin, twin_config

    config = twin_config(_run_file(arguments), model, _changes(arguments))
    result = _in_turns("experts and dense twin", lambda heard: bench_twin(config, blocks, heard), blocks, threads)
    _print_sides(result, "experts", "dense twin", TARGET)
    if json_file is not None:
        result.write(json_file)


def _run_file(arguments: list[str] | None) -> Path | None:
    files = [Path(text) for text in arguments or [] if "=" not in text]
    if len(files) > 1:
        raise typer.BadParameter(f"one run file at a time, not {' and '.join(map(str, files))}")
    return files[0] if files else None


def _changes(arguments: list[str] | None) -> list[str]:
    return [text for text in arguments or [] if "=" in text]


def _in_turns(
    sides: str, bench: Callable[[Callable[[int, int], None]], BenchResult], blocks: int, threads: int | None
) -> BenchResult:
    """Run a benchmark of two sides under a progress bar."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    if threads is not None:
        torch.set_num_threads(threads)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{sides}, in turns", total=blocks)
        return bench(lambda done, _: progress.update(task, completed=done))


@app.command()
def data(
    tokens: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE", help="Size of the streams; repeat it for more. By default 10M, 100M, 1B, 1T."),
    ] = None,
    seq_length: Annotated[int, typer.Option(min=1, help="Tokens in a sample.")] = 4096,
    sequences: Annotated[int, typer.Option(min=1, help="Samples of an optimizer step.")] = 32,
    microbatch: Annotated[int, typer.Option(min=1, help="Samples handed over together.")] = 8,
    document: Annotated[int, typer.Option(min=2, help="Mean length of a document, in tokens.")] = 1000,
    repeats: Annotated[int, typer.Option(min=2, help="Fresh processes for each figure.")] = 5,
    peer_limit: Annotated[
        str, typer.Option(metavar="SIZE", help="Measure Megatron Core up to this size; 0 for not at all.")
    ] = "1B",
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A model of configs/models whose need of tokens to compare with; repeat it, or `none`."
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch for these models.")] = 1,
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="Where the streams are made, and deleted afterwards.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure our loader beside Megatron Core's GPTDataset and BlendedDataset on the same token files.

    Measured are the time to the first microbatch (from nothing, and again with the index files that the first start
    left), the memory and the index files that takes, and how many samples a second follow in training order: each
    figure in fresh processes, without workers, taking turns. Streams up to 200M tokens are written out and in memory;
    longer ones are holes in sparse files, and out of it.

    Examples:
      megacpt bench data
      megacpt bench data --tokens 10M --model none --json data.json
      megacpt bench data --tokens 10B --peer-limit 10B --repeats 3
    """
    from rich.console import Console
    from rich.progress import Progress

    from megacpt.bench.data import DataBench, bench_data
    from megacpt.config import Tokens

    try:
        limit = 0 if peer_limit == "0" else int(Tokens.parse(peer_limit))
        sizes = tuple(int(Tokens.parse(size)) for size in tokens) if tokens else DataBench.tokens
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    models = DataBench.models if not model else tuple(name for name in model if name != "none")
    bench = DataBench(
        tokens=sizes,
        seq_length=seq_length,
        sequences=sequences,
        microbatch=microbatch,
        document=document,
        repeats=repeats,
        peer_limit=limit,
        models=models,
        threads=threads,
    )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loaders, in turns", total=None)
        result = bench_data(bench, folder, lambda done, of: progress.update(task, completed=done, total=of))
    if json_file is not None:
        result.write(json_file)
    _print_data(result)


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


def _print_sides(result: BenchResult, first: str, second: str, target: float) -> None:
    """Print the steps of two sides and their ratio."""
    from rich.console import Console
    from rich.table import Table

    from megacpt.bench.result import Interval
    from megacpt.bench.step import CPU, PASSES

    table = Table("", "step", "middle half", PASSES, CPU, "tokens/s")
    for name in (first, second):
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
    whole = f"{first} / {second}"
    for name, remark in ((whole, f"; the aim is {target} at most"), (f"{whole}: {CPU}", "")):
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


def _print_data(result: BenchResult) -> None:
    from rich.console import Console
    from rich.table import Table

    from megacpt.bench import data as measured
    from megacpt.bench.result import Interval

    console, config = Console(highlight=False), result.config
    console.print(
        f"samples of {config['seq_length']} tokens, {config['sequences']} a step in microbatches of "
        f"{config['microbatch']}, documents of about {config['document']} tokens; {result.machine.device}, "
        f"{config['repeats']} processes a figure",
        soft_wrap=True,
    )
    table = Table("", "first start", "start again", "memory", "index files", "samples/s", "middle half")
    for name in (measured.case_name(size, streams) for size in config["tokens"] for streams in (1, 3)):
        table.add_section()
        table.add_row(f"[bold]{name}[/bold]")
        for side in (measured.OURS, measured.PEER, measured.PEER_IDS):
            if f"{name}: {side}: {measured.SPEED}" in result.series:
                table.add_row(side, *_loader_row(result, f"{name}: {side}"))
    console.print(table)
    for model in config["models"]:
        training = result.series[f"{model}: {measured.TRAINING}"]
        found = result.figures[f"{model}: {measured.TRAINING} / {measured.LOADING}"]
        assert isinstance(found, Interval)
        console.print(
            f"{model} trains {training.work / training.median:,.0f} tokens/s; the loader is "
            f"[bold]{found.value:,.0f}[/bold] times as fast (95 % interval {found.low:,.0f} to {found.high:,.0f})",
            soft_wrap=True,
        )


def _loader_row(result: BenchResult, side: str) -> Iterator[str]:
    from megacpt.bench import data as measured

    for start in (measured.FIRST, measured.AGAIN):
        yield _time(result.series[f"{side}: {start}"].median)
    for size in (measured.MEMORY, measured.INDEX):
        yield _size(result.figures[f"{side}: {size}"])
    speed = result.series[f"{side}: {measured.SPEED}"]
    low, high = sorted(speed.work / time for time in speed.quartiles)
    yield f"{speed.work / speed.median:,.0f}"
    yield f"{low:,.0f} to {high:,.0f}"


def _size(found: Interval | float) -> str:
    assert isinstance(found, float)  # not a ratio
    return f"{found / 1e9:.1f} GB" if found >= 1e9 else f"{found / 1e6:.1f} MB" if found >= 1e5 else f"{found:,.0f} B"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
