"""Looking at a stream: what it is, how long its documents are, and how the first ones read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.data.indexed import IndexedTokens, token_files
from megacpt.data.stream import META_FILE, StreamMeta, TokenStream
from megacpt.data.tokenizer import Tokenizer, load_tokenizer
from megacpt.errors import DataError, SetupError

LENGTH_SAMPLE = 1_000_000


@dataclass(frozen=True)
class Glance:
    """What `glance` found.

    `meta` is None for token files without a description; `lengths` gives minimum, median, mean, 99th
    percentile and maximum of the document lengths in tokens; `texts` are the beginnings of the first
    documents; `notes` say what is missing or unusual.
    """

    path: Path
    meta: StreamMeta | None
    documents: int
    tokens: int
    dtype: str
    lengths: dict[str, float]
    texts: list[str]
    notes: list[str]


def glance(path: str | Path, tokenizer: str | Path | None = None, documents: int = 3, characters: int = 300) -> Glance:
    """Look at the stream folder or the Megatron prefix `path`.

    `tokenizer` decodes the first `documents`, up to `characters` each; by default it is the one that the
    stream was made with. Raises DataError when there is no stream or it is damaged.
    """
    path = Path(path)
    if path.suffix in {".bin", ".idx"}:
        path = path.with_suffix("")
    notes: list[str] = []
    meta: StreamMeta | None = None
    if not (path / META_FILE).is_file() and token_files(path)[1].is_file():
        indexed = IndexedTokens(path)
        notes.append(
            f"there is no {META_FILE} beside these files, as Megatron writes none: what made them is not "
            f"known. 'megacpt data adopt {path} --tokenizer TOKENIZER' describes them, so that they can be "
            "trained on"
        )
    else:
        stream = TokenStream.open(path)
        meta, indexed = stream.meta, stream.indexed
    decoder = _decoder(meta, tokenizer, notes)
    if indexed.documents > LENGTH_SAMPLE:
        notes.append(f"the lengths are those of {LENGTH_SAMPLE:,} evenly spaced documents")
    return Glance(
        path=path,
        meta=meta,
        documents=indexed.documents,
        tokens=indexed.tokens,
        dtype=indexed.dtype.name,
        lengths=_length_statistics(indexed.document_lengths(LENGTH_SAMPLE)),
        texts=[_beginning(indexed, i, decoder, characters) for i in range(min(documents, indexed.documents))],
        notes=notes,
    )


def _decoder(meta: StreamMeta | None, spec: str | Path | None, notes: list[str]) -> Tokenizer | None:
    chosen = spec if spec is not None else meta.tokenizer if meta else None
    if chosen is None:
        return None
    try:
        tokenizer = load_tokenizer(chosen)
    except (DataError, SetupError) as error:
        if spec is not None:
            raise
        notes.append(f"the documents are shown as ids: {error}")
        return None
    if meta is not None and tokenizer.fingerprint != meta.tokenizer_fingerprint:
        if spec is not None:
            raise DataError(
                f"the tokenizer {spec} (fingerprint {tokenizer.fingerprint[:12]}) is not the one of the "
                f"stream: {meta.tokenizer} (fingerprint {meta.tokenizer_fingerprint[:12]})"
            )
        notes.append(f"the documents are shown as ids: {chosen} has changed since the stream was made")
        return None
    return tokenizer


def _beginning(indexed: IndexedTokens, index: int, tokenizer: Tokenizer | None, characters: int) -> str:
    # An id gives at least a quarter of a character, so that this is enough of a long document.
    ids = indexed.document(index, limit=4 * characters)
    if tokenizer is None:
        return " ".join(str(i) for i in ids[: characters // 4])
    return tokenizer.decode(ids)[:characters]


def _length_statistics(lengths: np.ndarray) -> dict[str, float]:
    if not lengths.size:
        return {}
    statistics: dict[str, Any] = {
        "minimum": lengths.min(),
        "median": np.median(lengths),
        "mean": lengths.mean(),
        "99 %": np.percentile(lengths, 99),
        "maximum": lengths.max(),
    }
    return {name: float(value) for name, value in statistics.items()}
