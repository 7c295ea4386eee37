"""Another size of the vocabulary: rows of embedding and head are added or taken off, everything else goes along."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megacpt.checkpoint.pieces import Piece, PieceReader
from megacpt.checkpoint.store import checkpoint_step, find_checkpoint, verify
from megacpt.checkpoint.tensors import OPTIMIZER
from megacpt.config import ModelConfig, load_run
from megacpt.continuation.boundary import RUN, tokenizer_record
from megacpt.continuation.ledger import Ledger
from megacpt.convert.derived import Progress, check_free, publish
from megacpt.data.tokenizer import Tokenizer, load_tokenizer
from megacpt.errors import CheckpointError, ConfigError
from megacpt.runtime.layout import start_process_group

TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")
_BLOCK = 1 << 24  # numbers that are held at a time


def resize_vocab(
    checkpoint: Path,
    out: Path,
    words: int | None = None,
    tokenizer: str | None = None,
    multiple: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint for a vocabulary of another size, as a run folder that holds it alone.

    New rows of embedding and head are the mean of those of the words there were, so that a new word is about as likely
    as an average one, and gradients tell them apart from the first step on (Hewitt 2021). The optimizer's means of new
    rows are 0, those of all other weights stay: a stage that continues the result need not re-warm for their sake.

    Args:
        checkpoint: a checkpoint, or a run folder for its newest.
        out: a new folder.
        words: entries of the vocabulary; None for those of `tokenizer`.
        tokenizer: of the result, whose first ids are those of the old one; None to keep it.
        multiple: rows are padded to a multiple of this; None for `model.vocab_multiple`.
        progress: told after each block: how many of this rank's are written, and how many there are in all.

    Returns:
        The new checkpoint.

    Raises:
        ConfigError: there would be fewer rows than words, neither number is given, or `out` holds a run.
        CheckpointError: the checkpoint is damaged, or the disk fails.
    """
    start_process_group()
    check_free(out)
    folder = find_checkpoint(checkpoint)
    verify(folder)
    config, ledger = load_run(folder / RUN), Ledger.read(folder)
    before = load_tokenizer(config.tokenizer)
    after = before if tokenizer is None else load_tokenizer(tokenizer)
    model = _resized(config.model, before, after, words, multiple)
    had = config.model.vocab_size or before.vocab_size
    rows = model.padded_vocab()
    reader = PieceReader(folder)
    means = {name: _mean_row(reader, name, had) for name in TABLES if name in reader.shapes()}
    pieces = [*_new_tables(reader, rows), *(p for p in reader.pieces(weights_only=False) if _table(p.name) is None)]

    def make(piece: Piece) -> Tensor:
        if (table := _table(piece.name)) is None:
            return reader.read(piece)
        kept = min(piece.offsets[0] + piece.sizes[0], had) - piece.offsets[0]
        new = means[table] if piece.name == table else torch.zeros(piece.sizes[1])
        block = new.to(piece.dtype).repeat(piece.sizes[0], 1)
        if kept > 0:
            old = reader.shapes(weights_only=False)[piece.name]
            block[:kept] = reader.read(replace(piece, sizes=(kept, piece.sizes[1]), shape=old))
        return block

    made = replace(
        ledger,
        parent=ledger.id,
        parent_path=str(folder.resolve()),
        tokenizer=tokenizer_record(after),
        model=model.model_dump(mode="json"),
        derived={
            "operation": "resize-vocab",
            **({} if ledger.weights_alone else {"optimizer": "kept"}),
            "of": [ledger.id],
            "words": [had, model.vocab_size],
            "rows": [config.model.padded_vocab(before.vocab_size), rows],
        },
    )
    changes = {"run": out, "model": model, "tokenizer": config.tokenizer if tokenizer is None else tokenizer}
    return publish(config.model_copy(update=changes), made, checkpoint_step(folder), pieces, make, progress)


def _resized(
    model: ModelConfig, before: Tokenizer, after: Tokenizer, words: int | None, multiple: int | None
) -> ModelConfig:
    """Return the model with the new vocabulary."""
    if words is None and after is before and multiple is None:
        raise ConfigError("say how large the vocabulary becomes: --vocab-size, --tokenizer, or --multiple for padding")
    had = model.vocab_size or before.vocab_size
    size = words if words is not None else had if after is before else max(after.vocab_size, had)
    if size < after.vocab_size:
        raise ConfigError(
            f"--vocab-size {size} is less than the {after.vocab_size} words of the tokenizer: take at least that many, "
            "or give a smaller tokenizer with --tokenizer"
        )
    changes = {"vocab_size": size, "vocab_multiple": multiple or model.vocab_multiple}
    return ModelConfig.model_validate({**model.model_dump(), **changes})


def _table(name: str) -> str | None:
    """Return which table of the vocabulary a tensor is, or keeps a mean of; None for neither."""
    if name.startswith(f"{OPTIMIZER}count."):
        return None
    return next((table for table in TABLES if name.endswith(table)), None)


def _mean_row(reader: PieceReader, name: str, words: int) -> Tensor:
    """Return the mean of the rows of a table that stand for words, [h] float64."""
    shape = reader.shapes()[name]
    if shape[0] < words:
        raise CheckpointError(f"{reader.folder}: {name} has {shape[0]} rows, and the vocabulary {words} words")
    total = torch.zeros(shape[1], dtype=torch.float64)
    for first, count in _stretches(words, shape[1]):
        piece = Piece(name, (first, 0), (count, shape[1]), shape, torch.float32)
        total += reader.read(piece).double().sum(0)
    return total / words


def _new_tables(reader: PieceReader, rows: int) -> list[Piece]:
    """Return the blocks of the tables in their new size, and of what the optimizer keeps of them."""
    found = []
    for name, shape in reader.shapes(weights_only=False).items():
        if _table(name) is not None:
            dtype = reader.tensors[name].properties.dtype
            new = (rows, shape[1])
            found += [Piece(name, (at, 0), (count, shape[1]), new, dtype) for at, count in _stretches(rows, shape[1])]
    return found


def _stretches(rows: int, width: int) -> list[tuple[int, int]]:
    """Cut rows into stretches that are held at a time: the first of each, and how many."""
    most = max(1, _BLOCK // width)
    return [(first, min(most, rows - first)) for first in range(0, rows, most)]
