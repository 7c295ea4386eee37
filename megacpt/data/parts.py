"""One shard of the input becomes one part: token files, and a manifest that is written last."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np

from megacpt.data.files import sync, write_json
from megacpt.data.indexed import IndexedTokens, IndexedWriter, score_file, token_files
from megacpt.data.inputs import Shard, shard_name
from megacpt.data.readers import read_documents
from megacpt.data.tokenizer import Tokenizer, token_dtype
from megacpt.errors import DataError

TRAIN, VALID = "train", "valid"
_REPORT_EVERY = 1 << 19


@dataclass(frozen=True)
class Recipe:
    """What, besides the text, decides the stream: the tokenizer, text field, share held out, score field."""

    tokenizer: str
    tokenizer_fingerprint: str
    field: str
    holdout: float
    score: str | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The streams that come out."""
        return (TRAIN, VALID) if self.holdout else (TRAIN,)


@dataclass(frozen=True)
class SplitCount:
    """What one part holds for one stream."""

    documents: int
    tokens: int
    bytes: int
    content_hash: str


@dataclass(frozen=True)
class Part:
    """A finished part: what it holds for each stream, and how many documents without text were left out."""

    name: str
    splits: Mapping[str, SplitCount]
    empty: int


def make_part(shard: Shard, folder: Path, recipe: Recipe, tokenizer: Tokenizer, report: Callable[[int], None]) -> Part:
    """Tokenise `shard` into `folder` and return the part; `report` gets the bytes of input done."""
    name = shard_name(shard)
    temporary = {split: folder / f"{name}.{split}.{os.getpid()}.tmp" for split in recipe.splits}
    sizes = dict.fromkeys(recipe.splits, 0)
    empty = unreported = 0
    with ExitStack() as stack:
        dtype = token_dtype(tokenizer.vocab_size)
        writer = partial(IndexedWriter, dtype=dtype, scored=recipe.score is not None)
        writers = {split: stack.enter_context(writer(path)) for split, path in temporary.items()}
        for piece in shard:
            for document in read_documents(piece, recipe.field, recipe.score):
                unreported += document.consumed
                if unreported >= _REPORT_EVERY:
                    report(unreported)
                    unreported = 0
                if not document.text:
                    empty += 1
                    continue
                split = VALID if _held_out(document.text, recipe.holdout) else TRAIN
                ids = tokenizer.encode(document.text)
                writers[split].add(np.append(ids, np.int32(tokenizer.eod)), document.score)
                sizes[split] += document.size
        splits = {
            split: SplitCount(writer.documents, writer.tokens, sizes[split], writer.finish())
            for split, writer in writers.items()
        }
    for split, path in temporary.items():
        final = part_prefix(folder, name, split)
        if recipe.score is not None:
            score_file(path).replace(score_file(final))
        for written, target in zip(token_files(path), token_files(final), strict=True):
            written.replace(target)
    sync(folder)
    part = Part(name, splits, empty)
    write_json(_manifest(folder, name), asdict(part))
    report(unreported)
    return part


def finished_part(folder: Path, name: str) -> Part | None:
    """Return the part `name` if it was finished and its files still have their sizes, else None."""
    try:
        content = json.loads(_manifest(folder, name).read_bytes())
        splits = {split: SplitCount(**count) for split, count in content["splits"].items()}
        for split in splits:
            IndexedTokens(part_prefix(folder, name, split))
    except (FileNotFoundError, DataError):
        return None
    return Part(name, splits, content["empty"])


def part_prefix(folder: Path, name: str, split: str) -> Path:
    """Return the prefix of the token files of part `name` for the stream `split`."""
    return folder / f"{name}.{split}"


def _manifest(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _held_out(text: str, share: float) -> bool:
    """Decide by a hash of the text alone, so that copies of a document are never on both sides."""
    if not share:
        return False
    digest = blake2b(text.encode(), digest_size=8, person=b"megacpt-holdout").digest()
    return int.from_bytes(digest, "little") < share * 2**64
