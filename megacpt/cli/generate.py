"""``megacpt generate``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megacpt.errors import ConfigError, SetupError

if TYPE_CHECKING:
    import torch

    from megacpt.config import ModelConfig
    from megacpt.data.tokenizer import Tokenizer

# What a model writes must not steer the terminal: control characters are shown as pictures.
_HARMLESS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


class Rounding(str, Enum):
    """Of the activations of packed layers."""

    FLOAT = "float"
    INT8 = "int8"
    FP8 = "fp8"


class Device(str, Enum):
    """Where a model computes."""

    CPU = "cpu"
    CUDA = "cuda"


def generate(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A checkpoint, the folder of a run for its newest, or a folder of `convert pack`."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue; empty begins a document.")],
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Stop after this many tokens.")] = 128,
    temperature: Annotated[
        float,
        typer.Option(metavar="T", help="0 always takes the likeliest token; 1 draws as the model says."),
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Draw from the K likeliest tokens only.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Draw from the likeliest tokens of probability P together."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws; the same seed gives the same text.")] = 0,
    activations: Annotated[
        Rounding | None,
        typer.Option(
            help="Of a packed folder: `float` multiplies the inputs of packed layers as they are, `int8` rounds them "
            "to 8 bits, which is faster on the CPU, `fp8` to float8; what the model was trained with if left out."
        ),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(
            help="Of a packed folder: cuda (in bfloat16) or cpu (in float32); a GPU if there is one, unless "
            "MEGACPT_DEVICE=cpu, if left out."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as `parallel.tensor=2`.")
    ] = None,
) -> None:
    """Let a model continue a text, token by token.

    Examples:
      megacpt generate runs/english --prompt "The quick brown"
      megacpt generate runs/english --prompt "The quick brown" --temperature 0.8 --top-p 0.95 --seed 3
      megacpt generate packed --prompt "The quick brown" --activations int8 --device cpu
      torchrun --nproc-per-node 2 -m megacpt generate runs/english --prompt "The" parallel.tensor=2
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ConfigError("--prompt: the text is not UTF-8")
    chosen = (max_tokens, temperature, top_k, top_p, seed)
    if _for_use(path):
        _from_folder(path, prompt, chosen, activations, device, overrides or [])
    else:
        if device is not None:
            raise ConfigError(f"--device is for packed folders, and {path} is a checkpoint: set MEGACPT_DEVICE")
        _from_checkpoint(path, prompt, chosen, activations, overrides or [])


_Chosen = tuple[int, float, "int | None", "float | None", int]


def _for_use(path: Path) -> bool:
    """Whether a folder holds a model as `convert` writes it for use, or was meant to."""
    return (path / "config.json").is_file() or any(path.glob("*.safetensors*"))


def _from_folder(
    path: Path,
    prompt: str,
    chosen: _Chosen,
    activations: Rounding | None,
    device: Device | None,
    overrides: list[str],
) -> None:
    from megacpt.serve.generation import generate as run
    from megacpt.serve.opened import open_decoder

    if overrides:
        raise ConfigError(f"{' '.join(overrides)}: {path} runs as it was written; only a checkpoint takes KEY=VALUE")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(f"{path} runs in one process: start it without torchrun")
    decoder, tokenizer = open_decoder(path, None if activations is None else activations.value, _found(device))
    _tell(prompt, tokenizer, decoder.model, chosen, partial(run, decoder), _show)


def _found(device: Device | None) -> torch.device:
    """The device that is asked for; by default that of all commands."""
    import torch

    from megacpt.runtime.device import local_device

    if device is None:
        return local_device()
    if device is Device.CUDA and not torch.cuda.is_available():
        raise SetupError("--device cuda: torch finds no CUDA device on this machine; take --device cpu")
    return torch.device(device.value)


def _from_checkpoint(
    path: Path, prompt: str, chosen: _Chosen, activations: Rounding | None, overrides: list[str]
) -> None:
    from megacpt.continuation.opened import open_model
    from megacpt.evaluate.generation import generate as run
    from megacpt.runtime.layout import is_first_rank, stop_process_group

    if activations is not None:
        raise ConfigError(
            f"--activations {activations.value}: {path} is a checkpoint, which computes as it was trained; write it "
            "for use with `megacpt convert pack` first"
        )
    engine, tokenizer, config = open_model(path, overrides=overrides)
    show = _show if is_first_rank() else _ignore
    _tell(prompt, tokenizer, config.model, chosen, partial(run, engine), show)
    stop_process_group()


def _tell(
    prompt: str,
    tokenizer: Tokenizer,
    model: ModelConfig,
    chosen: _Chosen,
    run: Callable[..., list[int]],
    show: Callable[[str], None],
) -> None:
    """Run a model on the prompt, and show the text as it comes."""
    from megacpt.evaluate.text_stream import TextStream

    tokens = [int(token) for token in tokenizer.encode(prompt)]
    text = TextStream(tokenizer, tokens)
    show(prompt)
    started = time.perf_counter()
    found = run(
        tokens,
        *chosen,
        tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
        on_token=lambda token: show(text.add(token)),
    )
    seconds = time.perf_counter() - started
    show(text.end() + "\n")
    if show is _ignore:
        return
    if len(found) == chosen[0]:
        why = "stopped at --max-tokens"
    elif len(tokens) + len(found) >= model.max_seq_length:
        why = "stopped at model.max_seq_length"
    else:
        why = "the model ended the document"
    note = f"{len(found):,} tokens, {len(found) / max(seconds, 1e-9):,.0f} tokens/s, {why}"
    typer.secho(note, dim=True, err=True)


def _show(text: str) -> None:
    if text:
        safe = text.translate(_HARMLESS) if sys.stdout.isatty() else text
        typer.echo(safe, nl=False)


def _ignore(_text: str) -> None:
    """Another rank shows it."""
