"""``megacpt bench convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megacpt.bench.result import BenchResult


def convert(
    model: Annotated[str, typer.Option(help="A Llama: a name from configs/models, or a YAML file.")] = "llama3-8b",
    layers: Annotated[int, typer.Option(min=0, help="Of the model; 0 for all of them.")] = 2,
    workers: Annotated[int, typer.Option(min=1, help="Threads that convert.")] = 1,
    blocks: Annotated[int, typer.Option(min=2, help="Times of each side.")] = 3,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where to write: on the disk that is to be measured. A temporary one if left out."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")
    ] = None,
) -> None:
    """Measure `from-hf` and `to-hf` beside a plain copy of the same files, and the memory that they take.

    The weights are random numbers in bfloat16 in the real shapes; what is written is flushed to the disk on all sides.

    Examples:
      megacpt bench convert
      megacpt bench convert --layers 0 --blocks 2 --folder /scratch    # all of an 8B model: 64 GB of disk
    """
    import tempfile

    from rich.console import Console
    from rich.progress import Progress

    from megacpt.bench.convert import ConvertBench, bench_convert
    from megacpt.runtime.layout import stop_process_group

    bench = ConvertBench(model, layers or None, workers=workers, blocks=blocks)
    with (
        tempfile.TemporaryDirectory(prefix="megacpt-", dir=folder) as place,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task("copying and converting, in turns", total=bench.turns)
        result = bench_convert(bench, Path(place), lambda: progress.advance(task))
    stop_process_group()
    if json_file is not None:
        result.write(json_file)
    _print(result)


def _print(result: BenchResult) -> None:
    from rich.console import Console
    from rich.table import Table

    from megacpt.bench.convert import COPY, IN, MEMORY_TARGET, OUT, TARGET

    console, config = Console(highlight=False), result.config
    console.print(f"{config['parameters'] / 1e9:.2f}B parameters, {config['bytes'] / 1e9:.2f} GB in {config['dtype']}")
    table = Table("", "MB/s", "share of the copy", "memory / largest tensor")
    for name in (COPY, IN, OUT):
        series = result.series[name]
        share, memory = result.figures.get(f"{name} / {COPY}"), result.figures.get(f"{name}: memory / largest tensor")
        table.add_row(
            name,
            f"{series.work / series.median / 1e6:,.0f}",
            ""
            if share is None or isinstance(share, float)
            else f"{share.value:.2f} \\[{share.low:.2f}, {share.high:.2f}]",
            f"{memory:.2f}" if isinstance(memory, float) else "",
        )
    console.print(table)
    console.print(
        f"the aims are a share of {TARGET:g} at least, and less than {MEMORY_TARGET:g} times the largest tensor"
    )
