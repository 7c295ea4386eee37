"""Taking over token files that Megatron wrote: they stay as they are and get a description."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import track

from megacpt.data.files import disk_full
from megacpt.data.indexed import IndexedTokens, content_hash
from megacpt.data.stream import META_FILE, StreamMeta, files_relative_to
from megacpt.data.tokenizer import Tokenizer, load_tokenizer
from megacpt.errors import DataError


def adopt(
    prefix: str | Path, tokenizer: str | Path, out: str | Path | None = None, progress: bool = True
) -> StreamMeta:
    """Describe the files ``PREFIX.bin`` and ``PREFIX.idx`` in ``OUT/stream.json``, so that `out` is a stream.

    Nothing is copied: the description points at the files. `out` defaults to a folder `prefix` beside them.
    Everything is read once, to check that the ids are those of `tokenizer`, to count the bytes of its text
    and to hash.

    Raises DataError when the files are damaged, when an id is outside the vocabulary, or when `out` is
    something else.
    """
    prefix = Path(prefix)
    if prefix.suffix in {".bin", ".idx"}:
        prefix = prefix.with_suffix("")
    folder = prefix if out is None else Path(out)
    if (folder / META_FILE).exists() or (folder.exists() and not folder.is_dir()):
        raise DataError(f"{folder} exists and is a stream or a file: choose another --out, or remove it")
    indexed, vocabulary = IndexedTokens(prefix), load_tokenizer(tokenizer)
    indexed.check_positions()
    text_bytes, ended = _read_documents(indexed, vocabulary, progress)
    meta = StreamMeta(
        name=folder.name,
        files=files_relative_to(folder, prefix),
        tokenizer=vocabulary.spec,
        tokenizer_fingerprint=vocabulary.fingerprint,
        vocab_size=vocabulary.vocab_size,
        eod=vocabulary.eod,
        documents=indexed.documents,
        tokens=indexed.tokens,
        bytes=text_bytes,
        dtype=indexed.dtype.name,
        content_hash=content_hash(prefix),
        sources=[{"path": str(prefix.absolute())}],
        settings={"adopted": True, "documents_with_end": ended},
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        meta.write(folder)
    except OSError as error:
        raise DataError(f"{folder / META_FILE} cannot be written: {disk_full(error) or error.strerror}") from error
    return meta


def _read_documents(indexed: IndexedTokens, tokenizer: Tokenizer, progress: bool) -> tuple[int, int]:
    """Return the UTF-8 bytes of the text of all documents, and how many of them end with the end id."""
    text_bytes = ended = 0
    numbers = track(
        range(indexed.documents),
        "reading",
        console=Console(stderr=True),
        disable=not progress,
        update_period=0.5,
    )
    for number in numbers:
        ids = indexed.document(number)
        if ids.size and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise DataError(
                f"{indexed.bin_path}: document {number} has id {wrong}, but the vocabulary of "
                f"{tokenizer.spec} ends at {tokenizer.vocab_size - 1}: it was made with another tokenizer"
            )
        text_bytes += len(tokenizer.decode(ids).encode())
        ended += int(ids.size > 0 and ids[-1] == tokenizer.eod)
    return text_bytes, ended
