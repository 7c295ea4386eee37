"""``megacpt bench ternary``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from megacpt.bench.result import BenchResult, Interval


def ternary(
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default torch's own choice.")] = None,
    blocks: Annotated[int | None, typer.Option(min=2, help="Times of every figure; more narrow the interval.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, to see that it runs; the figures say little.")
    ] = False,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            metavar="PYTHON",
            help="An interpreter that has llama-cpp-python: measure llama.cpp (TQ2_0) on the same weights too.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")
    ] = None,
) -> None:
    """Measure packed ternary products, generation and training beside float32, all sides taking turns.

    Single products go through 64 MB of matrices or more, so that they come from memory. Generation is that of a model
    of 99M parameters with random weights; "dense float32" runs the same compiled decoder, the other one torch's
    products. Training is a step of 8 microbatches.

    Examples:
      megacpt bench ternary
      megacpt bench ternary --threads 1 --json ternary.json
      megacpt bench ternary --llama-cpp other/.venv/bin/python
    """
    from dataclasses import replace

    import torch
    from rich.console import Console
    from rich.progress import Progress

    from megacpt.bench.ternary import QUICK, TernaryBench, bench_ternary

    if threads is not None:
        torch.set_num_threads(threads)
    bench = QUICK if quick else TernaryBench()
    if blocks is not None:
        bench = replace(bench, blocks=blocks)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("ternary and float, in turns", total=bench.turns)
        result = bench_ternary(bench, llama_cpp, lambda: progress.advance(task))
    if json_file is not None:
        result.write(json_file)
    _print(result)


def _print(result: BenchResult) -> None:
    from rich.console import Console

    from megacpt.bench import ternary as measured
    from megacpt.bench import ternary_training as training
    from megacpt.bench.step import CPU

    console, machine = Console(highlight=False), result.machine
    console.print(
        f"{machine.device}, {machine.threads} thread{'s' * (machine.threads > 1)}, kernels {machine.kernels}, "
        f"torch {machine.versions['torch']}; medians ± half the width of the middle half",
        soft_wrap=True,
    )
    console.print(_layers(result))
    console.print(_generation(result))
    for key, aim in _aims(result):
        found = result.figures[key]
        if isinstance(found, float):
            console.print(f"{key}: [bold]{found:,.0f}[/bold] of {result.config['count']}", soft_wrap=True)
        else:
            console.print(f"{key}: [bold]{found.value:.2f}[/bold] ({_interval(found)}{aim})", soft_wrap=True)
    name = f"{training.TERNARY} / float"
    for suffix, aim in (("", f"; the aim is {measured.TRAINING_TARGET:.2f} at most"), (f": {CPU}", "")):
        found = result.figures[f"{name}{suffix}"]
        assert not isinstance(found, float)
        console.print(f"{name}{suffix}: [bold]{found.value:.3f}[/bold] ({_interval(found)}{aim})", soft_wrap=True)
    if machine.load > machine.cores / 2:
        console.print(
            f"[yellow]the machine was busy (load {machine.load:g} on {machine.cores} cores): take more --blocks, or "
            "--threads 1[/yellow]",
            soft_wrap=True,
        )


def _layers(result: BenchResult) -> Table:
    from rich.table import Table

    from megacpt.bench import ternary_layers as layers

    table = Table("matrix", "tokens", *(f"{side} (ms)" for side in layers.SIDES), "int8 x float32")
    for o, i in result.config["shapes"]:
        for tokens in result.config["tokens"]:
            case = layers.case_name(o, i, tokens)
            times = (_median(result, f"{case}: {side}", 1e3) for side in layers.SIDES)
            table.add_row(
                f"{o} x {i}", str(tokens), *times, _times(result, f"{case}: {layers.INT8} x {layers.FLOAT32}")
            )
    return table


def _generation(result: BenchResult) -> Table:
    from rich.table import Table

    from megacpt.bench import ternary_decode as decode

    table = Table(result.config["model"]["name"], "decode (ms a token)", "tokens/s", "prefill (ms a token)", "tokens/s")
    for key in result.series:
        part, _, side = key.partition(": ")
        if part == decode.DECODE:
            table.add_row(side, *_rate(result, key), *_rate(result, f"{decode.PREFILL}: {side}"))
    return table


def _aims(result: BenchResult) -> Iterator[tuple[str, str]]:
    """The figures of generation that are printed, and what each should be."""
    from megacpt.bench import ternary as measured
    from megacpt.bench import ternary_decode as decode
    from megacpt.bench.llama_peer import NAME

    for other, target in (
        (decode.DENSE, measured.DECODE_TARGET),
        (decode.DENSE_TORCH, measured.DECODE_TARGET),
        (NAME, measured.LLAMA_TARGET),
    ):
        key = f"{decode.DECODE}: {decode.INT8} x {other}"
        if key in result.figures:
            yield key, f"; the aim is {target:g} at least"
    if measured.AGREEMENT in result.figures:
        yield measured.AGREEMENT, ""


def _rate(result: BenchResult, key: str) -> tuple[str, str]:
    """Milliseconds a token, and tokens a second."""
    series = result.series[key]
    return _median(result, key, 1e3 / series.work), f"{series.work / series.median:,.0f}"


def _median(result: BenchResult, key: str, factor: float) -> str:
    """The median time, and half the width of the middle half of all times."""
    series = result.series[key]
    low, high = series.quartiles
    return f"{series.median * factor:.3g} ± {(high - low) / 2 * factor:.1g}"


def _times(result: BenchResult, key: str) -> str:
    found = result.figures[key]
    assert not isinstance(found, float)
    return f"{found.value:.1f} \\[{found.low:.1f}, {found.high:.1f}]"


def _interval(found: Interval) -> str:
    return f"95 % interval {found.low:.2f} to {found.high:.2f}"
