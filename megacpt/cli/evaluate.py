"""``megacpt eval`` and ``megacpt flips``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from megacpt.config import RunConfig
    from megacpt.data.tokenizer import Tokenizer
    from megacpt.engine.megatron import MegatronEngine
    from megacpt.evaluate.flips import Flips
    from megacpt.evaluate.lm_eval import TaskResults
    from megacpt.evaluate.loss import StreamLoss


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run for its newest.")],
    stream: Annotated[list[Path] | None, typer.Option(help="A held-out stream; may be given several times.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Predictions a stream, such as 100k; all if left out.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
    instances: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Also write what it got right, document by document, for `megacpt flips`.",
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Tasks of the lm-eval package, such as arc_easy,lambada_openai."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with YAML files of further lm-eval tasks.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions a task at most, for a quick look.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Worked examples before each question; each task's own if left out.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Measure a checkpoint: its loss on token streams, its answers to the tasks of lm-eval, or both.

    Examples:
      megacpt eval runs/python --stream data/english-valid --stream data/python-valid
      megacpt eval runs/python --stream data/english-valid --instances python.jsonl
      megacpt eval runs/python --lm-eval arc_easy,hellaswag --limit 200
      torchrun --standalone --nproc-per-node 2 -m megacpt eval runs/python --stream data/c parallel.tensor=2
    """
    from megacpt.continuation.opened import open_model
    from megacpt.data.files import write_json
    from megacpt.errors import ConfigError
    from megacpt.runtime.layout import is_first_rank, stop_process_group

    if not stream and not lm_eval:
        raise ConfigError("nothing to measure: name streams with --stream, or tasks with --lm-eval")
    most = _count(tokens)
    _check_before_loading(lm_eval is not None, [json_file, instances])
    engine, tokenizer, config = open_model(checkpoint, overrides=overrides or [])
    tasks = None if lm_eval is None else _tasks(engine, tokenizer, lm_eval, include_path, limit, fewshot)
    losses = _streams(engine, tokenizer, config, checkpoint, stream or [], most, instances, tasks)
    if is_first_rank():
        _show(losses, tasks)
        if json_file is not None:
            content: dict[str, Any] = {"checkpoint": str(checkpoint), "streams": [vars(loss) for loss in losses]}
            if tasks is not None:
                scores = [vars(score) for score in tasks.scores]
                content["lm_eval"] = {"version": tasks.package, "limit": limit, "tasks": scores}
            write_json(json_file, json.loads(json.dumps(content)))
    stop_process_group()


def _check_before_loading(tasks: bool, outputs: Iterable[Path | None]) -> None:
    """Find what would otherwise go wrong only after a large model has been loaded, or measured."""
    from megacpt.errors import ConfigError
    from megacpt.evaluate.lm_eval import require_package

    if tasks:
        require_package()
    for path in outputs:
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}")


def _count(tokens: str | None) -> int | None:
    """The number that ``--tokens`` names."""
    from megacpt.config import Tokens
    from megacpt.errors import ConfigError

    try:
        return None if tokens is None else int(Tokens.parse(tokens))
    except ValueError as error:
        raise ConfigError(f"--tokens: '{tokens}': {error}") from error


def _tasks(
    engine: MegatronEngine,
    tokenizer: Tokenizer,
    names: str,
    include_path: Path | None,
    limit: int | None,
    fewshot: int | None,
) -> TaskResults:
    """Run the tasks, with a bar on the first rank."""
    from rich.progress import Progress

    from megacpt.evaluate.lm_eval import evaluate_tasks
    from megacpt.runtime.layout import is_first_rank

    with Progress(console=Console(stderr=True), disable=not is_first_rank(), transient=True) as bar:

        def progress(what: str, count: int) -> Any:
            task = bar.add_task(what, total=count)
            return lambda more: bar.advance(task, more)

        asked = [name.strip() for name in names.split(",") if name.strip()]
        return evaluate_tasks(engine, tokenizer, asked, include_path, limit, fewshot, progress)


def _streams(
    engine: MegatronEngine,
    tokenizer: Tokenizer,
    config: RunConfig,
    checkpoint: Path,
    folders: Iterable[Path],
    most: int | None,
    instances: Path | None,
    tasks: TaskResults | None,
) -> list[StreamLoss]:
    """The loss of each stream; with `instances`, the record of them and of the questions of `tasks` too."""
    from megacpt.checkpoint.store import find_checkpoint
    from megacpt.continuation.ledger import Ledger
    from megacpt.data.stream import TokenStream
    from megacpt.errors import ConfigError
    from megacpt.evaluate.instances import Header, documents_and_loss, record_writer
    from megacpt.evaluate.loss import evaluate_stream
    from megacpt.runtime.layout import is_first_rank

    streams = [(folder.name, TokenStream.open(folder, tokenizer=tokenizer)) for folder in folders]
    length, microbatch = config.evaluate.seq_length or config.batch.seq_length, config.batch.microbatch
    if instances is None:
        return [evaluate_stream(engine, *named, length, most, microbatch) for named in streams]
    contents = {name: stream.meta.content_hash for name, stream in streams}
    if len(contents) < len(streams):
        raise ConfigError("--instances: two streams have the same name; write a record of each")
    contents |= {} if tasks is None else tasks.versions()
    ledger = Ledger.read(find_checkpoint(checkpoint)).id
    header = Header(str(checkpoint), ledger, tokenizer.fingerprint, contents)
    writer = record_writer(instances, header) if is_first_rank() else nullcontext(lambda _: None)
    with writer as write:
        losses = [documents_and_loss(engine, *named, length, most, microbatch, write) for named in streams]
        for question in () if tasks is None else tasks.questions:
            write(question)
    return losses


def _show(losses: list[StreamLoss], tasks: TaskResults | None) -> None:
    """Print what was found."""
    console = Console()
    if losses:
        table = Table("stream", "nats/token", "bits/byte", "tokens")
        for loss in losses:
            table.add_row(loss.stream, f"{loss.loss:.4f}", f"{loss.bits_per_byte:.4f}", f"{loss.tokens:,}")
        console.print(table)
    if tasks is not None:
        table = Table("task", "few-shot", "metric", "value", "± stderr", "questions")
        for score in tasks.scores:
            name = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
            arrow = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
            stderr = "" if score.stderr is None else f"{score.stderr:.4f}"
            few = "" if score.fewshot is None else str(score.fewshot)
            table.add_row(score.task, few, name + arrow, f"{score.value:.4f}", stderr, f"{score.questions:,}")
        console.print(table)


def flips(
    before: Annotated[Path, typer.Argument(metavar="BEFORE.jsonl", help="Record of the earlier checkpoint.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER.jsonl", help="Record of the later one.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Show what a later checkpoint gets wrong that an earlier one got right.

    The records are what `megacpt eval --instances` writes. Lost are the negative flips, right before and wrong after;
    won are the positive ones. A relative loss of 1 is what two unrelated models of these accuracies would show.

    Examples:
      megacpt eval runs/english --stream data/english-valid --instances english.jsonl
      megacpt eval runs/python --stream data/english-valid --instances python.jsonl
      megacpt flips english.jsonl python.jsonl
    """
    from megacpt.data.files import write_json
    from megacpt.evaluate.flips import compare

    found = compare(before, after)
    table = Table("stream or task", "predictions", "right before", "right after", "lost", "won", "relative", "worse")
    for one in found:
        table.add_row(*_row(one))
    console = Console()
    console.print(table)
    for one in found:
        if one.worst:
            worst = "; ".join(f"{w.index} ({w.before:.3f} to {w.after:.3f})" for w in one.worst)
            console.print(f"{one.stream}: documents whose nats a token rose most: {worst}", highlight=False)
    if json_file is not None:
        write_json(json_file, {"before": str(before), "after": str(after), "flips": [one.to_dict() for one in found]})


def _row(one: Flips) -> tuple[str, ...]:
    accuracies = (one.hits_before / one.predictions, one.hits_after / one.predictions)
    shares = (*accuracies, one.negative, one.positive)
    relative = "" if one.relative is None else f"{one.relative:.3f}"
    worse = "" if one.worse is None else f"{one.worse:.1%} of {one.instances:,}"
    return (one.stream, f"{one.predictions:,}", *(f"{share:.2%}" for share in shares), relative, worse)
