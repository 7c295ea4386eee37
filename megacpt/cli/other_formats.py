"""``megacpt convert from-megatron|to-megatron|from-neox|verify``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from megacpt.cli.making import Checkpoint, Destination, Dtype, NewRun, exporting, place

Stored = Annotated[Dtype, typer.Option(help="In which the checkpoint keeps the weights; training goes on in float32.")]
OfModel = Annotated[str, typer.Option(help="The model's tokenizer: bytes, or the path of a file or folder.")]


def from_megatron(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="The folder that Megatron saved to, or one of its iterations.")
    ],
    tokenizer: OfModel,
    destination: Destination = None,
    out: NewRun = None,
    model: Annotated[
        str | None,
        typer.Option(help="A name from configs/models or a YAML file, where Megatron-LM's arguments are missing."),
    ] = None,
    dtype: Stored = Dtype.FLOAT32,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and convert; each holds a tensor.")] = 1,
) -> None:
    """Make a run folder of a GPT checkpoint of Megatron-LM or Megatron Core, in the format torch_dist.

    Any layout it was saved in will do; nothing is gathered. The optimizer's float32 weights are taken where they are.

    Examples:
      megacpt convert from-megatron checkpoints/llama --tokenizer tokenizers/llama --out runs/llama
      megacpt convert from-megatron saved/iter_0010000 --model llama3-8b --tokenizer tokenizers/llama3 --out runs/llama
    """
    from megacpt.convert.adopt import adopt
    from megacpt.convert.megatron import open_megatron

    made = place(destination, out)
    with exporting(made, "converting", shared=True) as told:
        adopt(open_megatron(path, model), made, tokenizer, "from-megatron", dtype.value, workers, told)


def to_megatron(
    checkpoint: Checkpoint,
    destination: Destination = None,
    out: Annotated[Path | None, typer.Option(help="A new folder; Megatron-LM takes it as --load.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of all weights; what the run computes in if left out.")] = None,
) -> None:
    """Write the weights of a checkpoint for Megatron-LM, in the format torch_dist, for any layout.

    Load it with --load OUT --finetune --use-checkpoint-args, and your tokenizer.

    Examples:
      megacpt convert to-megatron runs/english --out english-megatron
      megacpt convert to-megatron runs/english --dtype bfloat16 --out english-megatron
    """
    from megacpt.convert.megatron import to_megatron as run

    made = place(destination, out)
    with exporting(made, "writing") as told:
        run(checkpoint, made, None if dtype is None else dtype.value, told)


def from_neox(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder global_stepN of GPT-NeoX.")],
    tokenizer: OfModel,
    destination: Destination = None,
    out: NewRun = None,
    config: Annotated[
        Path | None, typer.Option(help="Its YAML file, or a folder of them; `configs` in PATH if left out.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read tensors out of its *.pt files; GPT-NeoX writes no others.")
    ] = False,
    dtype: Stored = Dtype.FLOAT32,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and convert; each holds a tensor.")] = 1,
) -> None:
    """Make a run folder of a checkpoint of GPT-NeoX, a file a layer or a file a rank, of any tensor parallelism.

    Examples:
      megacpt convert from-neox global_step143000 --tokenizer 20B_tokenizer.json --allow-pickle --out runs/pythia
    """
    from megacpt.convert.adopt import adopt
    from megacpt.convert.neox import open_neox

    made = place(destination, out)
    with exporting(made, "converting", shared=True) as told:
        adopt(open_neox(path, config, allow_pickle), made, tokenizer, "from-neox", dtype.value, workers, told)


def verify(
    checkpoint: Checkpoint,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model of Hugging Face that should be the same.")],
    tolerance: Annotated[
        float, typer.Option(help="Largest difference of two logits, as a share of the largest logit.")
    ] = 1e-4,
) -> None:
    """Run a checkpoint and a model of Hugging Face on the same tokens and compare their logits, in float32.

    It writes verification.json into the run folder, and ends with 2 if they are not the same function. `from-hf` and
    `to-hf` do it by themselves.

    Examples:
      megacpt convert verify runs/qwen Qwen2.5-0.5B
    """
    from rich.console import Console

    from megacpt.checkpoint.store import find_checkpoint
    from megacpt.convert.verification import verify as run

    found = find_checkpoint(checkpoint)
    with Console(stderr=True).status("comparing with transformers"):
        card = run(found, folder, found.parent.parent, tolerance)
    Console(stderr=True).print(card.line(), highlight=False)


COMMANDS: dict[str, Callable[..., None]] = {
    "from-megatron": from_megatron,
    "to-megatron": to_megatron,
    "from-neox": from_neox,
    "verify": verify,
}
