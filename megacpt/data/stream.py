"""The token stream: a folder with Megatron token files and a ``stream.json`` that says what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megacpt.data.files import write_json
from megacpt.data.indexed import IndexedTokens, content_hash, token_files
from megacpt.data.tokenizer import Tokenizer
from megacpt.errors import DataError, nearest

META_FILE = "stream.json"
FORMAT = 1
Verify = Literal["size", "full"]


@dataclass(frozen=True)
class StreamMeta:
    """What ``stream.json`` says.

    `name` is the name of the stream, `files` the prefix of its token files (relative to the folder, or
    absolute), `tokenizer` the spec it was made with, `bytes` the UTF-8 bytes of its text (for losses in bits
    a byte), `sources` what went in, and `settings` how it was prepared.
    """

    name: str
    files: str
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    eod: int
    documents: int
    tokens: int
    bytes: int
    dtype: str
    content_hash: str
    sources: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write ``stream.json`` into `folder`, atomically."""
        write_json(folder / META_FILE, {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> StreamMeta:
        """Read the ``stream.json`` of `folder`; raise DataError when it is missing or not as it should be."""
        path = folder / META_FILE
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}): prepare or adopt the stream again") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise DataError(f"{path} is not a stream description of format {FORMAT}: prepare or adopt the stream again")
        names = {field.name for field in fields(cls)}
        if content.keys() != names:
            wrong = sorted(content.keys() ^ names)
            raise DataError(
                f"{path} lacks or has too many keys ({', '.join(wrong)}): prepare or adopt the stream again"
            )
        return cls(**content)


class TokenStream:
    """An opened stream. Opening costs the same for any size; ids are read through a memory map.

    `tokens` and `documents` count; `meta` describes; `indexed` are the token files.
    """

    def __init__(self, folder: Path, meta: StreamMeta, indexed: IndexedTokens) -> None:
        self.folder = folder
        self.meta = meta
        self.indexed = indexed
        self.tokens = indexed.tokens
        self.documents = indexed.documents

    @classmethod
    def open(cls, path: str | Path, verify: Verify = "size", tokenizer: Tokenizer | None = None) -> TokenStream:
        """Open the stream folder `path`.

        ``verify="size"`` checks that the sizes agree with the description, ``verify="full"`` reads everything
        and checks the content hash too. With `tokenizer`, the stream must have been made with the same one.

        Raises DataError when something is missing, damaged or made with another tokenizer.
        """
        folder = Path(path)
        if not (folder / META_FILE).is_file():
            raise DataError(_why_no_stream(folder))
        meta = StreamMeta.read(folder)
        stream = cls(folder, meta, IndexedTokens(folder / meta.files))
        stream._compare_with_meta()
        if verify == "full":
            stream._check_content()
        if tokenizer is not None:
            stream.require_tokenizer(tokenizer)
        return stream

    def read(self, offset: int, count: int) -> np.ndarray:
        """Return ids [count] as int64 from position `offset` of the stream."""
        return self.indexed.read(offset, count)

    def document(self, index: int) -> np.ndarray:
        """Return the ids of document `index` as int64 [n], its end-of-document id included."""
        return self.indexed.document(index)

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise DataError, naming both, unless the stream was made with `tokenizer`."""
        if self.meta.tokenizer_fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"the stream {self.folder} was made with tokenizer {self.meta.tokenizer} (fingerprint "
                f"{self.meta.tokenizer_fingerprint[:12]}), but the model uses {tokenizer.spec} (fingerprint "
                f"{tokenizer.fingerprint[:12]}): prepare the stream again with the model's tokenizer"
            )

    def _compare_with_meta(self) -> None:
        found = {"tokens": self.tokens, "documents": self.documents, "dtype": self.indexed.dtype.name}
        for key, value in found.items():
            said = getattr(self.meta, key)
            if said != value:
                raise DataError(
                    f"{self.folder / META_FILE} says {key} {said}, but {self.indexed.bin_path} has {value}: "
                    "they do not belong together; prepare or copy the stream again"
                )

    def _check_content(self) -> None:
        self.indexed.check_positions()
        found = content_hash(self.folder / self.meta.files)
        if found != self.meta.content_hash:
            raise DataError(
                f"the content of {self.indexed.bin_path} (or its .idx) has changed: its hash is "
                f"{found[:16]}, {META_FILE} says {self.meta.content_hash[:16]}; copy or prepare the stream "
                "again"
            )


def _why_no_stream(folder: Path) -> str:
    """Say what is at `folder` instead of a stream, and what to do about it."""
    if folder.with_name(f"{folder.name}.partial").is_dir():
        return f"the stream {folder} is not finished: run its 'megacpt data prepare' command again to go on"
    if token_files(folder)[1].is_file():
        return (
            f"{folder} are token files without a {META_FILE}, as Megatron writes them: describe them with "
            f"'megacpt data adopt {folder} --tokenizer TOKENIZER', then use the folder that it writes"
        )
    if folder.is_dir():
        return f"the folder {folder} is no token stream: it has no {META_FILE}"
    siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
    return f"there is no token stream {folder}{nearest(folder.name, siblings)}"


def files_relative_to(folder: Path, prefix: Path) -> str:
    """Return how a description in `folder` names `prefix`: relative, so that both can move together."""
    return str(Path(os.path.relpath(prefix.absolute().parent, folder.absolute()), prefix.name))
