"""``megacpt data``: text into token streams, tokenizers, and a look at both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megacpt.data.inspect import Glance
    from megacpt.data.stream import StreamMeta

app = typer.Typer(no_args_is_help=True, help="Prepare token streams, train tokenizers, and look at streams.")

_Inputs = Annotated[
    list[Path],
    typer.Argument(metavar="INPUT", help="Files (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet) or folders of them."),
]
_TOKENIZER_HELP = "'bytes', a SentencePiece .model file, a tokenizer.json, or a folder with one of them."
_Field = Annotated[str, typer.Option(help="The field or column that holds the text, in JSON lines and Parquet.")]


@app.command()
def prepare(
    inputs: _Inputs,
    tokenizer: Annotated[str, typer.Option(help=_TOKENIZER_HELP)],
    out: Annotated[Path, typer.Option(help="The stream folder to write.")],
    field: _Field = "text",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one for each core.")] = None,
    holdout: Annotated[str, typer.Option(help="Share of documents kept for evaluation, in OUT-valid.")] = "0%",
    score: Annotated[
        str | None, typer.Option(help="A field with a number for each document, by which stages can choose and order.")
    ] = None,
) -> None:
    """Tokenise text into a stream.

    Each .txt file is one document, each line or row of the others is one. Stopped at any moment, the same
    command goes on where it was.

    For example:

      megacpt data prepare books/ --tokenizer bytes --out data/books

      megacpt data prepare web.jsonl.zst --tokenizer tok/ --out data/web --holdout 1%

      megacpt data prepare web.jsonl.zst --tokenizer tok/ --out data/web --score quality
    """
    from megacpt.data.prepare import prepare as run

    meta = run(inputs, tokenizer, out, field=field, workers=workers, holdout=_share(holdout), score=score)
    _print_stream(out, meta)


@app.command("train-tokenizer")
def train_tokenizer(
    inputs: _Inputs,
    vocab_size: Annotated[int, typer.Option(min=1, help="Number of pieces, bytes and marks included.")],
    out: Annotated[Path, typer.Option(help="The folder to write tokenizer.model into.")],
    field: _Field = "text",
) -> None:
    """Train a SentencePiece tokenizer that loses no text.

    For example:

      megacpt data train-tokenizer books/ web.jsonl --vocab-size 32000 --out tok/
    """
    from megacpt.data.train_tokenizer import train_tokenizer as run

    tokenizer = run(inputs, vocab_size, out, field=field)
    typer.echo(f"{tokenizer.spec}: {tokenizer.vocab_size:,} pieces; use it with --tokenizer {out}")


@app.command()
def inspect(
    stream: Annotated[Path, typer.Argument(help="A stream folder, or the prefix of Megatron's .bin and .idx files.")],
    tokenizer: Annotated[str | None, typer.Option(help=f"Decode with this one: {_TOKENIZER_HELP}")] = None,
    documents: Annotated[int, typer.Option(min=0, help="How many documents to show the beginning of.")] = 3,
) -> None:
    """Show what a stream is, how long its documents are, and how the first ones read.

    For example:

      megacpt data inspect data/books
    """
    from megacpt.data.inspect import glance

    _print_glance(glance(stream, tokenizer, documents))


@app.command()
def adopt(
    prefix: Annotated[Path, typer.Argument(help="The prefix of Megatron's .bin and .idx files.")],
    tokenizer: Annotated[str, typer.Option(help=f"What they were made with: {_TOKENIZER_HELP}")],
    out: Annotated[Path | None, typer.Option(help="The stream folder; by default PREFIX itself.")] = None,
) -> None:
    """Make a stream of token files that Megatron wrote, without copying them.

    For example:

      megacpt data adopt pile/pile_text_document --tokenizer tok/tokenizer.model
    """
    from megacpt.data.adopt import adopt as run

    meta = run(prefix, tokenizer, out)
    _print_stream(out or prefix, meta)


def _share(text: str) -> float:
    from megacpt.config.quantities import Share
    from megacpt.errors import ConfigError

    try:
        return float(Share.parse(text))
    except ValueError as error:
        raise ConfigError(f"--holdout {text}: {error}") from error


def _print_stream(path: Path, meta: StreamMeta) -> None:
    per_token = meta.bytes / max(meta.tokens, 1)
    typer.echo(f"{path}: {meta.documents:,} documents, {meta.tokens:,} tokens of {per_token:.2f} bytes")
    if left_out := meta.settings.get("empty_documents"):
        typer.echo(f"{left_out:,} documents without any text were left out")
    if meta.settings.get("holdout"):
        typer.echo(f"held out for evaluation: {path}-valid")


def _print_glance(found: Glance) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "stream": found.path,
        "documents": f"{found.documents:,}",
        "tokens": f"{found.tokens:,}",
        "stored as": found.dtype,
    }
    if found.meta is not None:
        rows |= {
            "tokenizer": f"{found.meta.tokenizer} ({found.meta.vocab_size:,} ids)",
            "fingerprint": found.meta.tokenizer_fingerprint[:16],
            "bytes of text": f"{found.meta.bytes:,} ({found.meta.bytes / max(found.tokens, 1):.2f} a token)",
            "content hash": found.meta.content_hash[:16],
            "made from": ", ".join(source["path"] for source in found.meta.sources),
            "settings": ", ".join(f"{key} {value}" for key, value in found.meta.settings.items()),
        }
    rows["tokens a document"] = ", ".join(f"{name} {value:,.0f}" for name, value in found.lengths.items())
    for name, value in rows.items():
        table.add_row(name, str(value))
    console = Console(highlight=False, markup=False)
    console.print(table)
    for number, text in enumerate(found.texts):
        console.rule(f"document {number}", align="left")
        console.print(text)
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)
