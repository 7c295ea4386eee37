"""``megacpt convert``: weights from other weights."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from megacpt.cli import other_formats, tensors
from megacpt.cli.bits import bits
from megacpt.cli.hugging_face import from_hf, to_hf
from megacpt.cli.making import Checkpoint, Destination, Dtype, NewRun, exporting, place

app = typer.Typer(no_args_is_help=True, help="Make checkpoints from checkpoints, and files that other programs read.")
app.command()(bits)
app.command("from-hf")(from_hf)
app.command("to-hf")(to_hf)
for name, command in {**other_formats.COMMANDS, **tensors.COMMANDS}.items():
    app.command(name)(command)


class TernaryBits(str, Enum):
    """Of a packed ternary weight."""

    FOUR_A_BYTE = "2"
    FIVE_A_BYTE = "1.6"


class MatrixType(str, Enum):
    """Of the matrices in a GGUF file."""

    TQ2_0 = "tq2_0"
    TQ1_0 = "tq1_0"
    F16 = "f16"
    F32 = "f32"


class PlainType(str, Enum):
    """Of embedding and head in a GGUF file."""

    F16 = "f16"
    F32 = "f32"


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


@app.command()
def pack(
    checkpoint: Checkpoint,
    destination: Destination = None,
    out: Annotated[Path | None, typer.Option(help="A new folder; `generate` runs it.")] = None,
    bits: Annotated[
        TernaryBits | None,
        typer.Option(help="Of a ternary weight: 2 (four a byte, the default) or 1.6 (five a byte)."),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of embedding, head and norms; what the run computes in if left out.")
    ] = None,
) -> None:
    """Pack the quantised matrices of a checkpoint into few bits, without loss.

    The folder is laid out as Hugging Face's (config.json, safetensors, tokenizer), with the codes of a matrix and their
    scales in its place. It is made matrix by matrix, in the memory of one, whatever the size of the model.

    Examples:
      megacpt convert pack runs/ternary --out packed
      megacpt convert pack runs/ternary --bits 1.6 --dtype bfloat16 --out packed
      megacpt generate packed --prompt "The quick brown"
    """
    from megacpt.convert.pack import pack as run

    made = place(destination, out)
    with exporting(made, "packing") as told:
        run(checkpoint, made, None if bits is None else bits.value, None if dtype is None else dtype.value, told)


@app.command("to-gguf")
def to_gguf(
    checkpoint: Checkpoint,
    destination: Destination = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.gguf", help="A new file; llama.cpp runs it.")] = None,
    matrices: Annotated[
        MatrixType | None,
        typer.Option(
            "--type", help="Of the matrices of attention and MLPs; tq2_0 for ternary ones if left out, else f16."
        ),
    ] = None,
    embedding: Annotated[PlainType, typer.Option(help="Of the embedding and the output projection.")] = PlainType.F16,
) -> None:
    """Write a checkpoint as a GGUF file for llama.cpp, ternary matrices in TQ2_0 or TQ1_0. Needs the package gguf.

    Examples:
      megacpt convert to-gguf runs/ternary --out ternary.gguf
      megacpt convert to-gguf runs/ternary --type tq1_0 --embedding f32 --out ternary.gguf
      megacpt convert to-gguf runs/english --type f16 --out english.gguf
    """
    from megacpt.convert.to_gguf import to_gguf as run

    made = place(destination, out)
    with exporting(made, "writing") as told:
        run(checkpoint, made, None if matrices is None else matrices.value, embedding.value, told)


@app.command()
def quantise(
    checkpoint: Checkpoint,
    bits: Annotated[int, typer.Option(min=2, max=8, help="Of a weight, such as 3, 4, 6 or 8.")],
    destination: Destination = None,
    out: NewRun = None,
    group: Annotated[int, typer.Option(min=8, help="Weights of a row that share a scale.")] = 128,
) -> None:
    """Round the matrices of a float checkpoint to few bits: the baseline that ternary training is measured against.

    Every weight goes to the nearest of 2^bits - 1 levels, symmetric around 0, a scale in float16 for each group.
    Embedding, head and norms stay. Under torchrun the ranks share the work.

    Examples:
      megacpt convert quantise runs/english --bits 4 --out runs/english-4bit
      megacpt eval runs/english-4bit --stream data/english-valid
      megacpt convert pack runs/english-4bit --out english-4bit
    """
    from megacpt.convert.round_to_nearest import round_to_nearest as run

    made = place(destination, out)
    with exporting(made, f"rounding to {bits} bits", shared=True) as told:
        run(checkpoint, made, bits, group, told)


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
