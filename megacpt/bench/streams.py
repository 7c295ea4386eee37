"""Streams of random tokens to measure loaders on: real token files of any size, cheap to make."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from megacpt.data.indexed import token_files
from megacpt.data.stream import StreamMeta
from megacpt.data.tokenizer import load_tokenizer
from megacpt.errors import DataError, MegacptError

DENSE = 2 * 10**8
"""Streams of up to so many tokens are written out; the ids of longer ones are a hole in the file, which reads as 0."""
DOCUMENTS = 10**6
"""Documents of a stream at most, so that an index takes 20 MB at most; longer streams have longer documents."""
_CHUNK = 1 << 24
_BYTES = 256


def make_stream(folder: Path, tokens: int, document: int, seed: int = 0) -> Path:
    """Make a stream of `tokens` random byte ids in documents of about `document` tokens (between half and 1.5 times).

    Its index is complete, so that Megatron Core reads it too; its content hash is made up, as nothing has read it.

    Returns:
        `folder`.

    Raises:
        DataError: the stream is shorter than a document.
        MegacptError: the file system does not take a file of that size.
    """
    if tokens < document:
        raise DataError(f"a stream of {tokens:,} tokens holds no document of {document:,}: use shorter documents")
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    bin_path, idx_path = token_files(folder / "tokens")
    try:
        with bin_path.open("wb") as file:
            for at in range(0, tokens if tokens <= DENSE else 0, _CHUNK):
                file.write(draw.integers(0, _BYTES, min(_CHUNK, tokens - at), np.uint16).tobytes())
            file.truncate(2 * tokens)
        lengths = _document_lengths(tokens, max(document, -(-tokens // DOCUMENTS)), draw)
        idx_path.write_bytes(_index(lengths))
    except OSError as error:
        raise MegacptError(f"a stream of {tokens:,} tokens cannot be written to {folder}: {error.strerror}") from error
    tokenizer = load_tokenizer("bytes")
    StreamMeta(
        name=folder.name,
        files="tokens",
        tokenizer=tokenizer.spec,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        documents=len(lengths),
        tokens=tokens,
        bytes=tokens,
        dtype="uint16",
        content_hash=f"{seed:032x}{tokens:032x}",
        sources=[],
        settings={"random": seed, "document": document},
    ).write(folder)
    return folder


def _document_lengths(tokens: int, document: int, draw: np.random.Generator) -> np.ndarray:
    """Lengths [n] that add up to `tokens`: boundaries at every `document` tokens, moved by up to a quarter of it."""
    even = np.arange(1, tokens // document, dtype=np.int64) * document
    moved = even + draw.integers(-(document // 4), document // 4 + 1, len(even))
    return np.diff(np.concatenate(([0], moved, [tokens])))


def _index(lengths: np.ndarray) -> bytes:
    """Megatron's index of documents of these lengths, a sequence each (the layout is explained in data/indexed.py)."""
    count = len(lengths)
    ends = np.cumsum(2 * lengths)
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, count, count + 1)
    parts = (lengths.astype(np.int32), ends - 2 * lengths, np.arange(count + 1))
    return b"".join([head, *(part.tobytes() for part in parts)])
