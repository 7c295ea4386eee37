"""``megacpt convert inspect|diff|task-vector|resize-vocab|reshard``: checkpoints tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacpt.cli.making import Checkpoint, Destination, NewRun, exporting, place

if TYPE_CHECKING:
    from megacpt.convert.inspection import Difference, Distance, Held

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result to this file.")]


def inspect(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A checkpoint, a run folder for its newest, or another torch_dist folder."),
    ],
    stats: Annotated[
        bool, typer.Option(help="Read the numbers: mean, deviation, largest, zeros, not a number.")
    ] = False,
    optimizer: Annotated[bool, typer.Option(help="Also the optimizer's state.")] = False,
    json_file: Json = None,
) -> None:
    """List the tensors of a checkpoint, block by block, without building the model.

    With --stats it ends with 1 if a tensor holds numbers that are infinite or not a number.

    Examples:
      megacpt convert inspect runs/english
      megacpt convert inspect runs/english/checkpoints/step-00001234 --stats --json english.json
      megacpt convert inspect megatron/iter_0010000
    """
    from rich.console import Console

    from megacpt.convert.inspection import damaged
    from megacpt.convert.inspection import inspect as run
    from megacpt.data.files import write_json

    with _bar("reading", show=stats) as told:
        found = run(_tensors_folder(path), optimizer, stats, told)
    _show_tensors(found, stats)
    if json_file is not None:
        write_json(json_file, {"path": str(path), "tensors": [_held(one) for one in found]})
    if wrong := damaged(found):
        Console(stderr=True).print("not numbers:\n  " + "\n  ".join(wrong), style="red", highlight=False)
        raise typer.Exit(1)


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint, or a run folder; distances are its share.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one, written by any layout.")],
    layers: Annotated[bool, typer.Option(help="A line for each tensor of each layer.")] = False,
    json_file: Json = None,
) -> None:
    """Say where the weights of two checkpoints differ, and by how much.

    "apart" is the norm of the difference over that of A; "equal" the share of numbers that are the same.

    Examples:
      megacpt convert diff runs/english runs/python
      megacpt convert diff runs/a runs/b --layers --json diff.json
    """
    from megacpt.convert.inspection import compare
    from megacpt.data.files import write_json

    with _bar("comparing") as told:
        found = compare(_tensors_folder(first), _tensors_folder(second), told)
    _show_difference(found, layers)
    if json_file is not None:
        places = [
            {"tensor": name, "layer": layer, **vars(one), "relative": one.relative, "cosine": one.cosine}
            for (name, layer), one in found.distances.items()
        ]
        rest = {"shapes": found.shapes, "only_first": found.only_first, "only_second": found.only_second}
        write_json(json_file, {"first": str(first), "second": str(second), "tensors": places, **rest})


def task_vector(
    base: Checkpoint,
    add: Annotated[
        list[str],
        typer.Option(
            metavar="CHECKPOINT[:SCALE]", help="What a checkpoint learned since the base, times SCALE (1); repeat it."
        ),
    ],
    out: Annotated[Path, typer.Option(help="A new folder; `eval`, `generate` and `continue` open it as a run.")],
) -> None:
    """Add to a base what continued checkpoints have learned, or take it away with a negative scale.

    The result is base + the sum of SCALE * (CHECKPOINT - base), block by block in float64 (Ilharco et al. 2023).

    Examples:
      megacpt convert task-vector runs/english --add runs/python:0.5 --add runs/german:0.5 --out runs/both
      megacpt convert task-vector runs/english --add runs/toxic:-1 --out runs/less-toxic
    """
    from megacpt.convert.average import task_vectors as run

    tuned = [_scaled(text) for text in add]
    with exporting(out, "adding task vectors", shared=True) as told:
        run(base, tuned, out, told)


def resize_vocab(
    checkpoint: Checkpoint,
    destination: Destination = None,
    out: NewRun = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Words of the new vocabulary.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="bytes, or a path: one whose first ids are those of the old one, with more behind."),
    ] = None,
    multiple: Annotated[int | None, typer.Option(min=1, help="Rows are padded to a multiple of this.")] = None,
) -> None:
    """Give a checkpoint a larger vocabulary, or other padding; everything else stays, the optimizer's state too.

    New rows of embedding and head are the mean of the words' rows, and their moments 0.

    Examples:
      megacpt convert resize-vocab runs/english --tokenizer tokenizers/english-and-german --out runs/english-wide
      megacpt convert resize-vocab runs/llama --multiple 128 --out runs/llama-128
    """
    from megacpt.convert.resize_vocab import resize_vocab as run

    made = place(destination, out)
    with exporting(made, "resizing", shared=True) as told:
        run(checkpoint, made, vocab_size, tokenizer, multiple, told)


def reshard(
    checkpoint: Checkpoint,
    destination: Destination = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder; the run in it resumes where the checkpoint is.")
    ] = None,
    tensor: Annotated[int, typer.Option(min=1, help="parallel.tensor of the layout that will read it.")] = 1,
    expert: Annotated[int, typer.Option(min=1, help="parallel.expert of that layout.")] = 1,
) -> None:
    """Write a run's checkpoint in the blocks that another layout reads, optimizer and ledger included.

    Any layout loads any checkpoint as it is; this makes it faster where many small blocks would have to be read often.

    Examples:
      megacpt convert reshard runs/large --tensor 2 --out runs/large-tp2
      torchrun --standalone --nproc-per-node 8 -m megacpt convert reshard runs/large --tensor 8 --out runs/large-tp8
    """
    from megacpt.convert.reshard import reshard as run

    made = place(destination, out)
    with exporting(made, "cutting anew", shared=True) as told:
        run(checkpoint, made, tensor, expert, told)


COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "diff": diff,
    "task-vector": task_vector,
    "resize-vocab": resize_vocab,
    "reshard": reshard,
}


def _tensors_folder(path: Path) -> Path:
    """The folder of tensors that a path means."""
    from megacpt.checkpoint.store import find_checkpoint
    from megacpt.checkpoint.tensors import METADATA

    return path if (path / METADATA).is_file() else find_checkpoint(path)


def _scaled(text: str) -> tuple[Path, float]:
    """Read ``CHECKPOINT[:SCALE]``."""
    from megacpt.errors import ConfigError

    path, colon, scale = text.rpartition(":")
    if not colon:
        return Path(text), 1.0
    try:
        return Path(path), float(scale)
    except ValueError as error:
        raise ConfigError(f"--add {text}: '{scale}' is no number; give CHECKPOINT or CHECKPOINT:0.5") from error


def _held(one: Held) -> dict[str, Any]:
    """A tensor for JSON."""
    numbers = [
        {"layer": layer, **vars(found), "mean": found.mean, "deviation": found.deviation}
        for layer, found in one.numbers.items()
    ]
    return {
        "name": one.name,
        "shape": one.shape,
        "dtype": one.dtype,
        "blocks": one.blocks,
        "bytes": one.bytes,
        "numbers": numbers,
    }


def _show_tensors(found: list[Held], stats: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    dtypes = sorted({one.dtype for one in found})
    whole = f"{sum(one.bytes for one in found) / 1e6:,.1f} MB"
    table = Table(show_footer=True, box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("tensor", f"{len(found)} tensors, {whole}, {', '.join(dtypes)}", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    for title in ("mean", "std", "largest", "zeros") if stats else ("dtype", "blocks", "MB"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in found:
        storage = (one.dtype, str(one.blocks), f"{one.bytes / 1e6:,.1f}")
        table.add_row(_short(one.name), "x".join(map(str, one.shape)), *(_numbers(one) if stats else storage))
    Console().print(table)


def _short(name: str) -> str:
    short = name.replace("decoder.layers.", "layers.").replace("layers.*.", "layers.").replace("optimizer.", "")
    return short.removesuffix(".weight")


def _numbers(one: Held) -> tuple[str, ...]:
    from megacpt.convert.inspection import Numbers

    whole = Numbers()
    for numbers in one.numbers.values():
        whole.join(numbers)
    share = whole.zeros / max(whole.count, 1)
    return f"{whole.mean:.2g}", f"{whole.deviation:.2g}", f"{whole.largest:.2g}", f"{share:.1%}"


def _show_difference(found: Difference, layers: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for title in ("tensor", "apart", "cosine", "largest", "equal"):
        table.add_column(title, justify="left" if title == "tensor" else "right", no_wrap=True)
    places = {name if layer is None else f"{name} {layer}": one for (name, layer), one in found.distances.items()}
    for name, one in (places if layers else found.by_name()).items():
        table.add_row(_short(name), *_cells(one))
    console.print(table)
    if not layers and len(by_layer := found.by_layer()) > 1:
        table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
        for title in ("layer", "apart", "cosine", "largest", "equal"):
            table.add_column(title, justify="right", no_wrap=True)
        for layer, one in by_layer.items():
            table.add_row("none" if layer is None else str(layer), *_cells(one))
        console.print(table)
    for name, (ours, theirs) in found.shapes.items():
        console.print(f"{name}: {list(ours)} in A, {list(theirs)} in B", highlight=False)
    for names, where in ((found.only_first, "A"), (found.only_second, "B")):
        if names:
            console.print(f"only in {where}: {', '.join(names)}", highlight=False)


def _cells(one: Distance) -> tuple[str, ...]:
    return f"{one.relative:.3g}", f"{one.cosine:.4f}", f"{one.largest:.2g}", f"{one.equal / max(one.count, 1):.1%}"


@contextmanager
def _bar(what: str, show: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar while the block runs, in a process alone."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, count: bar.update(task, completed=done, total=count)
