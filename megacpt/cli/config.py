"""`megacpt config`: look at a run, check it, and read what its keys mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megacpt.config import ModelConfig, RunConfig

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Look at a run, check it, explain its keys.")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file (or a stage file, with --continues).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as `optim.peak_lr=3e-4 parallel.tensor=2`."),
]
Ranks = Annotated[int | None, typer.Option("--ranks", min=1, metavar="N", help="Number of ranks of the whole job.")]
Continues = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="The run (folder or run.yaml) that is continued, where RUN.yaml is a stage file."),
]


@app.command()
def show(run_file: RunFile, overrides: Overrides = None, ranks: Ranks = None, continues: Continues = None) -> None:
    """Print the run as resolved: every key, and the numbers that follow from them.

    **Examples**

    `megacpt config show configs/runs/english.yaml`

    `megacpt config show configs/runs/english.yaml model=small batch.sequences=64 > my-run.yaml`
    """
    from megacpt.config import check_layout
    from megacpt.config.show import show as show_run

    config = _load(run_file, overrides, continues)
    vocab, mistake = _vocabulary(config)
    if mistake:
        typer.secho(f"the size of the model is not known: tokenizer: {mistake}", fg="yellow", err=True)
    if ranks is not None:
        check_layout(config, ranks, vocab)
    _print_yaml(show_run(config, vocab, ranks))


@app.command()
def check(run_file: RunFile, overrides: Overrides = None, ranks: Ranks = None, continues: Continues = None) -> None:
    """Check keys, values, the parallel layout, the tokenizer and the streams; list everything that is wrong.

    **Examples**

    `megacpt config check configs/runs/english.yaml --ranks 8 parallel.tensor=2`

    `megacpt config check configs/stages/python.yaml --continues runs/english`
    """
    from megacpt.config import check as check_run
    from megacpt.config.show import derived
    from megacpt.errors import ConfigError

    config = _load(run_file, overrides, continues)
    vocab, mistake = _vocabulary(config)
    mistakes = [f"tokenizer: {mistake}"] if mistake else []
    try:
        check_run(config, ranks, vocab)
    except ConfigError as error:
        mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    numbers = ", ".join(f"{name} {number:,}" for name, number in derived(config, vocab, ranks).items())
    typer.secho(f"{run_file} is fine", fg="green", nl=False)
    typer.echo(f": {numbers}")


@app.command()
def explain(
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="A key or a section; without it, all sections.")] = "",
) -> None:
    """Say what a key means: its type, default, allowed values, an example, and its uses in configs/.

    **Examples**

    `megacpt config explain optim.peak_lr`

    `megacpt config explain schedule`
    """
    from rich.console import Console

    from megacpt.config.explain import explain as explain_key

    console = Console(highlight=False)
    text = explain_key(key, width=min(console.width, 110))
    title, _, body = text.partition("\n")
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(body, markup=False, soft_wrap=True)


@app.command()
def dense_twin(
    source: Annotated[
        str, typer.Argument(metavar="MODEL_OR_RUN", help="A model (name or file), a run file, or a run folder.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the twin to this file.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write twin and costs to this file.")
    ] = None,
    multiple: Annotated[
        int, typer.Option(min=1, metavar="N", help="Make the twin's ffn a multiple of this, such as parallel.tensor.")
    ] = 1,
) -> None:
    """Print the dense model in which a token costs as many FLOPs as in a model with experts.

    Attention is the same; the MLP is as wide as the experts that a token uses and the shared one together. Costs and
    sizes of both are in comments at the top. Costs are counted in sequences of batch.seq_length of a run, and of
    max_seq_length of a model.

    **Examples**

    `megacpt config dense-twin runs/switch --out dense.yaml`

    `megacpt train my-run.yaml model=dense.yaml parallel.expert=1 run=runs/dense`

    `megacpt config dense-twin my-model.yaml --multiple 64 --json twin.json`
    """
    from megacpt.config.twin import dense_twin as twin_of
    from megacpt.data.files import write_bytes, write_json
    from megacpt.errors import ConfigError

    model, length, vocab = _model(source)
    twin = twin_of(model, length, vocab, multiple)
    try:
        if json_file is not None:
            write_json(json_file, twin.to_dict())
        if out is not None:
            write_bytes(out, twin.to_yaml().encode())
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from error
    if out is None:
        _print_yaml(twin.to_yaml())


def _model(source: str) -> tuple[ModelConfig, int, int | None]:
    """A model by itself or of a run, the length of its sequences, and the entries of its tokenizer if known."""
    from megacpt.config import load_model, load_run
    from megacpt.config.library import looks_like_path
    from megacpt.config.yaml_text import read_document

    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "run.yaml"
    elif not looks_like_path(source):
        model = load_model(source)
        return model, model.max_seq_length, None
    if "model" in read_document(path).data:
        run = load_run(path)
        return run.model, run.batch.seq_length, _vocabulary(run)[0]
    model = load_model(path)
    return model, model.max_seq_length, None


def _load(run_file: Path, overrides: list[str] | None, continues: Path | None) -> RunConfig:
    from megacpt.config import load_run, overlay
    from megacpt.config.yaml_text import read_document

    if continues is None:
        return load_run(run_file, overrides or ())
    parent = load_run(continues / "run.yaml" if continues.is_dir() else continues)
    # The folder of the new run is an option of `megacpt continue`: until then a placeholder stands for it.
    given = "run" in read_document(run_file).data or any(text.startswith("run=") for text in overrides or ())
    return overlay(parent, run_file, overrides or (), run=None if given else "DIR")


def _vocabulary(config: RunConfig) -> tuple[int | None, str | None]:
    """Entries of the run's tokenizer, or None and the reason why it cannot be read."""
    from megacpt.data import load_tokenizer
    from megacpt.errors import MegacptError

    try:
        return load_tokenizer(config.tokenizer).vocab_size, None
    except MegacptError as error:
        return None, str(error)


def _print_yaml(text: str) -> None:
    from rich.console import Console
    from rich.syntax import Syntax

    console = Console()
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default", word_wrap=True))
    else:
        typer.echo(text)
