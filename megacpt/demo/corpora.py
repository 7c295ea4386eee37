"""Real text in three domains from what every machine with Python, torch and numpy has: English, Python and C.

Nothing is downloaded. On one machine the result is always the same: documents are chosen in an order that a hash of
their place decides, and split into train and held-out by a hash of their content.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from megacpt.data.files import write_bytes, write_json
from megacpt.demo import headers, python_source
from megacpt.errors import DataError

MAX_BYTES = 8_000_000
_RECIPE = 1  # a change of what is taken or how it is cleaned takes the next number, so that old files are made again
_HELD_OUT = 20  # one document of so many
_SHORTEST = 120  # characters; shorter documents are mostly boilerplate
_LONGEST = 128_000  # bytes; longer ones are tables, or whole libraries in one header
_SUMMARY = "corpora.json"


@dataclass(frozen=True)
class Corpus:
    """The text of one domain as JSON lines with the fields ``text`` and ``source``.

    Attributes:
        name: of the domain.
        train: file with the documents to train on.
        valid: file with the held-out documents, about 5 % of all.
        documents: number of documents in `train`.
        bytes: UTF-8 bytes of the text in `train`.
    """

    name: str
    train: Path
    valid: Path
    documents: int
    bytes: int


@dataclass
class _Collection:
    """Documents of one domain, each once, up to `max_bytes` of text to train on."""

    name: str
    max_bytes: int
    full: bool = False
    size: int = 0
    train: list[tuple[str, str]] = field(default_factory=list)
    valid: list[tuple[str, str]] = field(default_factory=list)
    _seen: set[bytes] = field(default_factory=set)

    def add(self, source: str, text: str) -> None:
        """Take `text`, which was found at `source`, unless it is short, very long, known, or one too many."""
        text = text.strip() + "\n"
        size = len(text.encode())
        if self.full or len(text) < _SHORTEST or size > min(_LONGEST, self.max_bytes // 16):
            return
        key = sha256(" ".join(text.split()).encode()).digest()
        if key in self._seen:
            return
        self._seen.add(key)
        if int.from_bytes(key[:8], "big") % _HELD_OUT == 0:
            self.valid.append((source, text))
        elif self.size + size > self.max_bytes:
            self.full = True
        else:
            self.train.append((source, text))
            self.size += size


def write_corpora(folder: Path, max_bytes: int = MAX_BYTES) -> dict[str, Corpus]:
    """Write the texts of all domains into `folder`, or return at once where that was done before.

    Args:
        folder: where the files NAME-train.jsonl, NAME-valid.jsonl and corpora.json go; it is made where missing.
        max_bytes: most bytes of text to train on, for each domain.

    Returns:
        The corpora ``english``, ``python`` and ``c`` by name.

    Raises:
        SetupError: this machine lacks the source of the standard library, or the headers of torch and numpy.
        DataError: `max_bytes` leaves a domain without text.
    """
    if (done := _read_summary(folder, max_bytes)) is not None:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _SUMMARY).unlink(missing_ok=True)  # the files that it describes are about to change
    collections = _collect(max_bytes)
    for collection in collections:
        if not (collection.train and collection.valid):
            raise DataError(f"max_bytes={max_bytes:,} leaves the domain '{collection.name}' without text: give more")
        for part, documents in (("train", collection.train), ("valid", collection.valid)):
            write_bytes(_file(folder, collection.name, part), _json_lines(documents))
    corpora = {c.name: _corpus(folder, c.name, len(c.train), c.size) for c in collections}
    _write_summary(folder, max_bytes, corpora)
    return corpora


def _collect(max_bytes: int) -> tuple[_Collection, ...]:
    english, python, c = (_Collection(name, max_bytes) for name in ("english", "python", "c"))
    for source, text in python_source.topics():
        english.add(source, text)
    # Code and docstrings come out of the same parse, so that each file is read once.
    for place, path in _shuffled(python_source.files()):
        if english.full and python.full:
            break
        if (parts := python_source.split(path)) is None:
            continue
        code, docstrings = parts
        python.add(place, code)
        for docstring in docstrings:
            english.add(place, docstring)
    for place, path in _shuffled(headers.files()):
        if c.full:
            break
        if (header := headers.clean(path)) is not None:
            c.add(place, header)
    return english, python, c


def _shuffled(files: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, Path]]:
    """The files in an order that depends on their names alone, so that a cap takes a fair choice of them."""
    return iter(sorted(files, key=lambda item: sha256(item[0].encode()).digest()))


def _json_lines(documents: Iterable[tuple[str, str]]) -> bytes:
    lines = (json.dumps({"text": text, "source": source}, ensure_ascii=False) for source, text in documents)
    return "".join(f"{line}\n" for line in lines).encode()


def _file(folder: Path, name: str, part: str) -> Path:
    return folder / f"{name}-{part}.jsonl"


def _corpus(folder: Path, name: str, documents: int, size: int) -> Corpus:
    return Corpus(name, _file(folder, name, "train"), _file(folder, name, "valid"), documents, size)


def _write_summary(folder: Path, max_bytes: int, corpora: dict[str, Corpus]) -> None:
    entries = {
        name: {
            "documents": corpus.documents,
            "bytes": corpus.bytes,
            "files": {path.name: path.stat().st_size for path in (corpus.train, corpus.valid)},
        }
        for name, corpus in corpora.items()
    }
    write_json(folder / _SUMMARY, {"recipe": _RECIPE, "max_bytes": max_bytes, "corpora": entries})


def _read_summary(folder: Path, max_bytes: int) -> dict[str, Corpus] | None:
    """The corpora that lie in `folder` complete, as they would be made now; else None."""
    try:
        summary: dict[str, Any] = json.loads((folder / _SUMMARY).read_bytes())
        if (summary["recipe"], summary["max_bytes"]) != (_RECIPE, max_bytes):
            return None
        for entry in summary["corpora"].values():
            if any((folder / name).stat().st_size != size for name, size in entry["files"].items()):
                return None
        return {
            name: _corpus(folder, name, entry["documents"], entry["bytes"])
            for name, entry in summary["corpora"].items()
        }
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None  # never made, or not by this function: made now
