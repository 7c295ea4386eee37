"""``megacpt generate``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

# What a model writes must not steer the terminal: control characters are shown as pictures.
_HARMLESS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def generate(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or the folder of a run for its newest."),
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
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as `parallel.tensor=2`.")
    ] = None,
) -> None:
    """Let a checkpoint continue a text, token by token.

    Examples:
      megacpt generate runs/english --prompt "The quick brown"
      megacpt generate runs/english --prompt "The quick brown" --temperature 0.8 --top-p 0.95 --seed 3
      torchrun --nproc-per-node 2 -m megacpt generate runs/english --prompt "The" parallel.tensor=2
    """
    from megacpt.continuation.opened import open_model
    from megacpt.errors import ConfigError
    from megacpt.evaluate.generation import generate as run
    from megacpt.evaluate.text_stream import TextStream
    from megacpt.runtime.layout import is_first_rank, stop_process_group

    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ConfigError("--prompt: the text is not UTF-8")
    engine, tokenizer, config = open_model(checkpoint, overrides=overrides or [])
    tokens = [int(token) for token in tokenizer.encode(prompt)]
    text = TextStream(tokenizer, tokens)
    show = _show if is_first_rank() else _ignore
    show(prompt)
    started = time.perf_counter()
    found = run(
        engine,
        tokens,
        max_tokens,
        temperature,
        top_k,
        top_p,
        seed,
        tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
        on_token=lambda token: show(text.add(token)),
    )
    seconds = time.perf_counter() - started
    show(text.end() + "\n")
    if is_first_rank():
        if len(found) == max_tokens:
            why = "stopped at --max-tokens"
        elif len(tokens) + len(found) >= config.model.max_seq_length:
            why = "stopped at model.max_seq_length"
        else:
            why = "the model ended the document"
        note = f"{len(found):,} tokens, {len(found) / max(seconds, 1e-9):,.0f} tokens/s, {why}"
        typer.secho(note, dim=True, err=True)
    stop_process_group()


def _show(text: str) -> None:
    if text:
        safe = text.translate(_HARMLESS) if sys.stdout.isatty() else text
        typer.echo(safe, nl=False)


def _ignore(_text: str) -> None:
    """Another rank shows it."""
