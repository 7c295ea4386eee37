"""A run folder from weights of another program: one checkpoint of weights alone, which stages continue."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from megacpt import __version__
from megacpt.checkpoint.pieces import Piece
from megacpt.config import RunConfig
from megacpt.continuation.ledger import CONVERTED, Ledger
from megacpt.continuation.origin import converted_ledger
from megacpt.convert.derived import Progress, publish
from megacpt.convert.families import Source
from megacpt.convert.families.rows import put
from megacpt.convert.foreign import Foreign
from megacpt.convert.tokenizer_files import adopt_tokenizer
from megacpt.convert.weights import DTYPES, piece_of
from megacpt.data.tokenizer import Tokenizer, load_tokenizer
from megacpt.errors import ConfigError
from megacpt.runtime.layout import is_first_rank, start_process_group

log = logging.getLogger(__name__)
TOKENIZER = "tokenizer"
FAMILY = "family"
_NO_STREAM = "begin-a-stage-with-megacpt-continue"  # the path of a stream, for who would train this run itself
_LONGEST = 2048  # of the sequences that the run is described with; a stage names its own


def adopt(
    foreign: Foreign,
    out: Path,
    tokenizer: str | None,
    operation: str,
    dtype: str = "float32",
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write a model that was opened as a run folder that holds one checkpoint of weights alone; every rank calls this.

    At no time is more held than `workers` + 1 of our blocks, whatever the size of the model; under torchrun the ranks
    share the blocks.

    Args:
        foreign: the model.
        out: a new folder.
        tokenizer: as `load_tokenizer` takes it; None for the one that lies beside the model.
        operation: such as ``from-hf``, for the ledger.
        dtype: in which the checkpoint keeps the weights: ``float32`` as training here does, or ``bfloat16`` or
            ``float16``, half the size.
        workers: threads that read and convert ahead.
        progress: told after each block: how many of this rank's are written, and how many there are in all.

    Returns:
        The checkpoint.

    Raises:
        ConfigError: `out` is not empty; there is no tokenizer, or one of another model.
        CheckpointError: a file is damaged, or a tensor holds numbers that are infinite or none; names tensor and file.
            Nothing is left of `out`.
    """
    start_process_group()
    _check_empty(out)
    with _cleaned(out):
        spec, known = _tokenizer(foreign, out, tokenizer)
        _tell(foreign, known)
        config = _config(foreign, out, spec, operation)
        sources = {_piece(one, foreign, dtype): one for one in foreign.sources}

        def make(piece: Piece) -> Tensor:
            return assembled(sources[piece], foreign, piece.dtype).view(piece.sizes)

        ledger = _ledger(foreign, known, operation, dtype)
        return publish(config, ledger, 0, list(sources), make, progress, workers, _identity(foreign, ledger))


def assembled(source: Source, foreign: Foreign, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one of our tensors, or a block of it, made of theirs; [rows, ..], with a leading dim of experts.

    Raises:
        CheckpointError: as `WeightFiles.blocks`.
    """
    # Memory that is filled twice costs a tenth of a conversion.
    filled = sum(math.prod(target.shape) for target in source.targets) == math.prod(source.shape)
    whole = torch.empty(source.shape, dtype=dtype) if filled else torch.full(source.shape, source.fill, dtype=dtype)
    for target in source.targets:
        part = whole if target.expert is None else whole[target.expert]
        numbers = target.rows.numbers(foreign.model, source.rows)
        for first, block in foreign.weights.blocks(target.name):
            put(part, numbers, first, block)
    return whole


def family_of(ledger: Ledger) -> str | None:
    """Return the family that a lineage began with, however many stages ago; None if it began here."""
    for stage in reversed(ledger.stages):
        if stage.kind == CONVERTED and FAMILY in stage.changes:
            return str(stage.changes[FAMILY][1])
    return None


def _identity(foreign: Foreign, ledger: Ledger) -> str:
    """Say what the blocks are made of, so that an interrupted conversion goes on with the same alone."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in foreign.weights.files]
    return sha256(repr((ledger.id, files, __version__)).encode()).hexdigest()


def _piece(source: Source, foreign: Foreign, dtype: str) -> Piece:
    piece = piece_of(source, foreign.model.layers)
    exact = source.exact or not source.targets
    return piece if exact else replace(piece, dtype=DTYPES[dtype])


def _check_empty(out: Path) -> None:
    """Refuse a folder that holds anything but what a conversion leaves that was killed."""
    left = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    done = any((out / "checkpoints").glob("step-*"))
    if done or left - {"checkpoints", TOKENIZER}:
        raise ConfigError(f"{out} exists: choose another --out, or remove it")


@contextmanager
def _cleaned(out: Path) -> Iterator[None]:
    """Leave nothing of the folder when the block fails; where somebody stops it, the next call goes on."""
    try:
        yield
    except Exception:
        if is_first_rank():
            shutil.rmtree(out, ignore_errors=True)
        raise


def _tokenizer(foreign: Foreign, out: Path, spec: str | None) -> tuple[str, Tokenizer]:
    """Return what run.yaml calls the tokenizer, and the tokenizer; that of the model is copied into the run."""
    if spec is None:
        spec = str(out / TOKENIZER)
        found = adopt_tokenizer(foreign.folder, out / TOKENIZER, foreign.settings.get("eos_token_id"))
    else:
        found = load_tokenizer(spec)
    if found.vocab_size > foreign.rows:
        raise ConfigError(
            f"the tokenizer {found.spec} has {found.vocab_size:,} ids, and the embedding of {foreign.folder} "
            f"{foreign.rows:,} rows: it is the tokenizer of another model"
        )
    return spec, found


def _tell(foreign: Foreign, tokenizer: Tokenizer) -> None:
    """Say what a person should know."""
    if not is_first_rank():
        return
    ends = foreign.settings.get("eos_token_id")
    if ends is not None and tokenizer.eod not in (ends if isinstance(ends, list) else [ends]):
        log.warning("eos_token_id: %s, and documents end with %d, as the tokenizer says", ends, tokenizer.eod)
    for note in foreign.notes:
        log.warning("%s", note)
    if foreign.unknown:
        found = ", ".join(f"{key}: {value}" for key, value in sorted(foreign.unknown.items()))
        log.warning("keys of config.json that are not understood and not taken: %s", found)


def _config(foreign: Foreign, out: Path, tokenizer: str, operation: str) -> RunConfig:
    """The configuration around the weights, so that they open as a run; a stage gives its own optimizer and batch."""
    length = min(foreign.model.max_seq_length, _LONGEST)
    dtype = foreign.weights.tensors[f"{foreign.family.embedding}.weight"].dtype
    return RunConfig.model_validate(
        {
            "run": out,
            "model": foreign.model.model_dump(),
            "tokenizer": tokenizer,
            "stage": {"name": operation, "tokens": length, "mixture": {"unknown": _NO_STREAM}},
            "optim": {"peak_lr": 1e-5},
            "batch": {"sequences": 1, "seq_length": length},
            "precision": "bfloat16" if dtype is torch.bfloat16 else "float32",
        }
    )


def _ledger(foreign: Foreign, tokenizer: Tokenizer, operation: str, dtype: str) -> Ledger:
    details = {
        FAMILY: foreign.family.name,
        "source": foreign.folder.resolve().name,
        "sha256": foreign.sha256,
        "files": {path.name: path.stat().st_size for path in foreign.weights.files},
        "dtype": dtype,
        **({"notes": list(foreign.notes)} if foreign.notes else {}),
        **({"not_understood": foreign.unknown} if foreign.unknown else {}),
    }
    ledger = converted_ledger(foreign.model, tokenizer, operation, details)
    return ledger.with_stage(changes={FAMILY: [None, foreign.family.name]})
