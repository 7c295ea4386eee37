"""``megacpt eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run for its newest.")],
    stream: Annotated[list[Path], typer.Option(help="A held-out stream; may be given several times.")],
    tokens: Annotated[str | None, typer.Option(help="Predictions a stream, such as 100k; all if left out.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Measure the loss of a checkpoint on token streams.

    Examples:
      megacpt eval runs/python --stream data/english-valid --stream data/python-valid
      torchrun --standalone --nproc-per-node 2 -m megacpt eval runs/python --stream data/c parallel.tensor=2
    """
    from megacpt.config import Tokens
    from megacpt.continuation.opened import open_model
    from megacpt.data.files import write_json
    from megacpt.data.stream import TokenStream
    from megacpt.errors import ConfigError
    from megacpt.evaluate.loss import evaluate_stream
    from megacpt.runtime.layout import is_first_rank, stop_process_group

    try:
        limit = None if tokens is None else int(Tokens.parse(tokens))
    except ValueError as error:
        raise ConfigError(f"--tokens: '{tokens}': {error}") from error
    engine, tokenizer, config = open_model(checkpoint, overrides=overrides or [])
    results = [
        evaluate_stream(
            engine,
            path.name,
            TokenStream.open(path, tokenizer=tokenizer),
            config.batch.seq_length,
            limit,
            config.batch.microbatch,
        )
        for path in stream
    ]
    if is_first_rank():
        table = Table("stream", "nats/token", "bits/byte", "tokens")
        for result in results:
            row = (f"{result.loss:.4f}", f"{result.bits_per_byte:.4f}", f"{result.tokens:,}")
            table.add_row(result.stream, *row)
        Console().print(table)
        if json_file is not None:
            content = {"checkpoint": str(checkpoint), "streams": [vars(result) for result in results]}
            write_json(json_file, json.loads(json.dumps(content)))
    stop_process_group()
