"""``megacpt convert from-hf`` and ``to-hf``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megacpt.cli.making import Checkpoint, Destination, Dtype, NewRun, exporting, place, verified

Verify = Annotated[bool, typer.Option(help="Compare the logits of both with transformers, where it is installed.")]


def from_hf(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A folder with config.json, *.safetensors and the tokenizer.")
    ],
    destination: Destination = None,
    out: NewRun = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="bytes, or a path; for a model that comes without its tokenizer.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="In which the checkpoint keeps the weights; training goes on in float32.")
    ] = Dtype.FLOAT32,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and convert; each holds a tensor.")] = 1,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read tensors out of *.bin where there is no safetensors file.")
    ] = False,
    verify: Verify = True,
) -> None:
    """Make a run folder of a model of Hugging Face, to be evaluated, continued and written back.

    Families: Llama 2 and 3, Mistral, Qwen 2, 2.5 and 3, OLMo 2, GPT-NeoX (Pythia), Mixtral, Qwen 3 with experts,
    DeepSeek-V3, BitNet b1.58. All names and shapes are looked at before a weight is read; what cannot be converted is
    refused by the name of its key. The memory is that of the largest tensor. Under torchrun the ranks share the work.

    Examples:
      megacpt convert from-hf Qwen2.5-0.5B --out runs/qwen
      megacpt continue runs/qwen stage.yaml --run runs/qwen-german optim.peak_lr=2e-5
      torchrun --standalone --nproc-per-node 8 -m megacpt convert from-hf Mixtral-8x7B --out runs/mixtral
    """
    from megacpt.convert.from_hf import from_hf as run

    made = place(destination, out)
    with exporting(made, "converting", shared=True) as told:
        run(path, made, tokenizer, dtype.value, workers, allow_pickle, told)
    if verify:
        verified(made, path, made)


def to_hf(
    checkpoint: Checkpoint,
    destination: Destination = None,
    out: Annotated[Path | None, typer.Option(help="A new folder; transformers loads it.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of all weights; what the run computes in if left out.")] = None,
    family: Annotated[
        str | None,
        typer.Option(help="Such as llama or qwen2; the one that the model came from, or that has all it has."),
    ] = None,
    verify: Verify = True,
) -> None:
    """Write a checkpoint as a model of Hugging Face, quantised matrices as plain numbers.

    Examples:
      megacpt convert to-hf runs/english --out english-hf
      megacpt convert to-hf runs/ternary --dtype bfloat16 --out ternary-hf
      megacpt convert to-hf runs/english --family mistral --out english-mistral
      python -c "import transformers as t; print(t.AutoModelForCausalLM.from_pretrained('english-hf'))"
    """
    from megacpt.convert.to_hf import to_hf as run

    made = place(destination, out)
    with exporting(made, "writing") as told:
        run(checkpoint, made, None if dtype is None else dtype.value, told, family=family)
    if verify:
        verified(checkpoint, made, made)
