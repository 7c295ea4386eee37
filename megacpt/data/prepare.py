"""From text files to a token stream: in parallel, restartable, and the same for any number of workers.

Everything is written beside the stream, in ``OUT.partial``: a part for each shard of the input, then the
merged stream, which is verified and renamed to ``OUT`` at the very end. Whatever ends the program, the same
command goes on.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megacpt.data.files import disk_full, sync
from megacpt.data.indexed import IndexedTokens, IndexedWriter
from megacpt.data.inputs import shard_name
from megacpt.data.job import Job
from megacpt.data.parts import VALID, Part, SplitCount, finished_part, part_prefix
from megacpt.data.stream import StreamMeta, TokenStream
from megacpt.data.tokenizer import load_tokenizer, token_dtype
from megacpt.data.workers import default_workers, make_parts
from megacpt.errors import DataError

SHARD_BYTES = 64 << 20


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    field: str = "text",
    workers: int | None = None,
    holdout: float = 0.0,
    progress: bool = True,
    shard_bytes: int = SHARD_BYTES,
    score: str | None = None,
) -> StreamMeta:
    """Tokenise `inputs` into the stream folder `out` and return its description.

    `inputs` are files (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet) or folders of them; `field` names the
    text in JSON lines and Parquet. Each document ends with the tokenizer's end-of-document id; texts of no
    character are left out and counted. With a `holdout` share above 0, that share of the documents (chosen by
    a hash of their text) goes to a second stream ``OUT-valid``. `workers` defaults to the number of cores;
    `shard_bytes` is the input of one part. `score` names a field that holds a number for each document; the stream
    keeps them, so that a stage can choose and order its samples by them.

    Called again with the same arguments it goes on where it was stopped, or returns at once when it was done.
    In a script of your own, call it under ``if __name__ == "__main__":``, because workers start by importing
    the script.

    Raises DataError for bad input, a full disk, or an `out` that is something else; finished parts are then
    kept.
    """
    if not 0 <= holdout < 1:
        raise DataError(f"holdout must be a share from 0 to below 1, not {holdout}")
    if workers is not None and workers < 1:
        raise DataError(f"workers must be at least 1, not {workers}")
    job = Job.plan(inputs, load_tokenizer(tokenizer), Path(out), field, holdout, shard_bytes, score)
    with _storage_errors_explained(job):
        meta = job.done()
        if meta is not None and not job.partial.exists():
            return meta
        job.partial.mkdir(parents=True, exist_ok=True)
        with _lock(job.partial):
            if job.done() is None:
                job.begin()
                with _progress_bar(progress) as bar:
                    _make_missing_parts(job, workers or default_workers(), bar)
                    for split in reversed(job.recipe.splits):
                        _merge(job, split, bar)
            shutil.rmtree(job.partial)
    return StreamMeta.read(job.out)


def _make_missing_parts(job: Job, workers: int, bar: Progress) -> None:
    task = bar.add_task("tokenising", total=sum(piece.weight for shard in job.shards for piece in shard))
    missing = []
    for shard in job.shards:
        if finished_part(job.parts_folder, shard_name(shard)) is None:
            missing.append(shard)
        else:
            bar.advance(task, sum(piece.weight for piece in shard))
    for leftover in job.parts_folder.glob("*.tmp*"):
        leftover.unlink()
    make_parts(missing, job.parts_folder, job.recipe, job.tokenizer, workers, lambda done: bar.advance(task, done))


def _merge(job: Job, split: str, bar: Progress) -> None:
    """Put the parts of `split` together in the order of the input, verify the result, and name it."""
    if job.made(split) is not None:
        return
    parts = [finished_part(job.parts_folder, shard_name(shard)) for shard in job.shards]
    counts = [part.splits[split] for part in parts if part is not None]
    _require_documents(job, split, counts)
    staging, target, dtype = job.partial / split, job.target(split), token_dtype(job.tokenizer.vocab_size)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    task = bar.add_task(f"merging {target.name}", total=sum(count.tokens for count in counts) * dtype.itemsize)
    with IndexedWriter(staging / target.name, dtype, job.recipe.score is not None) as writer:
        for part, count in zip(parts, counts, strict=True):
            assert part is not None
            writer.extend(IndexedTokens(part_prefix(job.parts_folder, part.name, split)), count.content_hash)
            bar.advance(task, count.tokens * dtype.itemsize)
        content_hash = writer.finish()
    _describe(job, split, [part for part in parts if part is not None], content_hash).write(staging)
    TokenStream.open(staging, verify="full")
    if target.is_dir():
        target.rmdir()
    staging.rename(target)
    sync(target.parent)


def _require_documents(job: Job, split: str, counts: Sequence[SplitCount]) -> None:
    if any(count.documents for count in counts):
        return
    if split == VALID:
        raise DataError(
            f"holdout {job.recipe.holdout:.3g} takes whole documents, and of the few in the input it took "
            "none: give a larger share or more documents, or prepare the held-out text on its own"
        )
    raise DataError(f"no document is left for {job.out}: the input holds no text, or holdout took all of it")


def _describe(job: Job, split: str, parts: Sequence[Part], content_hash: str) -> StreamMeta:
    counts = [part.splits[split] for part in parts]
    return StreamMeta(
        name=job.target(split).name,
        files=job.target(split).name,
        tokenizer=job.tokenizer.spec,
        tokenizer_fingerprint=job.tokenizer.fingerprint,
        vocab_size=job.tokenizer.vocab_size,
        eod=job.tokenizer.eod,
        documents=sum(count.documents for count in counts),
        tokens=sum(count.tokens for count in counts),
        bytes=sum(count.bytes for count in counts),
        dtype=token_dtype(job.tokenizer.vocab_size).name,
        content_hash=content_hash,
        sources=job.sources,
        settings={
            "field": job.recipe.field,
            "holdout": job.recipe.holdout,
            "split": split,
            "empty_documents": sum(part.empty for part in parts),
            **({} if job.recipe.score is None else {"score": job.recipe.score}),
        },
    )


@contextmanager
def _storage_errors_explained(job: Job) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = disk_full(error)
        if reason is None:
            raise DataError(f"{error.filename or job.partial}: {error.strerror or error}") from error
        raise DataError(
            f"{reason} while preparing {job.out}: {job.kept()}. Make room (parts and the merged stream are "
            "on disk together for a while), then run the same command again: it goes on from there"
        ) from error


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the system lets go of it however the process ends."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is preparing this stream (it holds {folder}): wait for it") from error
        yield


def _progress_bar(shown: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
