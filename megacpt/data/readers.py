"""Documents from text, JSON lines and Parquet files; each error names the file and the line."""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, NamedTuple

from megacpt.data.inputs import Piece, open_parquet
from megacpt.errors import DataError, SetupError, nearest


class Document(NamedTuple):
    """The text of one document, its length in UTF-8 bytes, about how many bytes of the input it took, and its score."""

    text: str
    size: int
    consumed: int
    score: float | None = None


def read_documents(piece: Piece, field: str, score: str | None = None) -> Iterator[Document]:
    """Yield the documents of `piece` in order; `field` names the text in JSON lines and Parquet.

    With `score`, the field of that name holds a number for each document.

    Raises DataError, with file and line or row, for what is not valid text or no number; SetupError for a missing
    package.
    """
    fields = _Fields(field, score)
    if piece.kind == "text":
        if score is not None:
            raise DataError(f"{piece.path} is plain text, which has no field {score!r} for --score: use JSON lines")
        yield _read_text(piece)
    elif piece.kind == "parquet":
        yield from _read_parquet(piece, fields)
    elif piece.kind == "jsonl":
        yield from _read_range(piece, fields)
    else:
        yield from _read_compressed(piece, fields)
    piece.check_unchanged()


class _Fields(NamedTuple):
    """The names of the fields that hold the text and, where documents have one, the score."""

    text: str
    score: str | None

    def missing(self, there: list[str]) -> str | None:
        """Say which field is not among those that are `there`; None when nothing is missing."""
        for option, field in (("--field", self.text), ("--score", self.score)):
            if field is not None and field not in there:
                shown = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
                meant = nearest(field, there)
                return f"there is no field {field!r}, only: {shown or 'none at all'}{meant} (choose it with {option})"
        return None


def _read_text(piece: Piece) -> Document:
    raw = Path(piece.path).read_bytes()
    try:
        return Document(raw.decode(), len(raw), piece.weight)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{piece.path}, line {line}", error) from error


def _read_range(piece: Piece, fields: _Fields) -> Iterator[Document]:
    with Path(piece.path).open("rb") as file:
        if piece.start:
            # A line belongs to the piece it begins in: skip the rest of one that began before.
            file.seek(piece.start - 1)
            file.readline()
        begin = file.tell()
        while begin < piece.stop:
            line = file.readline()
            try:
                parsed = _parse(line, fields, first=begin == 0)
            except _LineError as error:
                raise DataError(f"{piece.path}, line {_line_number(piece.path, begin)}: {error}") from error
            begin += len(line)
            if parsed is not None:
                yield parsed._replace(consumed=len(line))


def _line_number(path: str, position: int) -> int:
    """Count lines up to `position`; only an error pays for it."""
    with Path(path).open("rb") as file:
        lines = 1
        while position > 0 and (chunk := file.read(min(position, 1 << 20))):
            lines += chunk.count(b"\n")
            position -= len(chunk)
    return lines


def _read_compressed(piece: Piece, fields: _Fields) -> Iterator[Document]:
    number, found, before = 0, False, 0
    with Path(piece.path).open("rb") as raw:
        lines: Any = gzip.GzipFile(fileobj=raw) if piece.kind == "jsonl.gz" else _open_zstd(piece.path, raw)
        try:
            for number, line in enumerate(lines, start=1):
                parsed = _parse(line, fields, first=number == 1)
                if parsed is not None:
                    after = raw.tell()
                    yield parsed._replace(consumed=after - before)
                    found, before = True, after
        except _LineError as error:
            raise DataError(f"{piece.path}, line {number}: {error}") from error
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(f"{piece.path} is damaged or cut short after line {number}: {error}") from error
    if not found:
        raise DataError(f"{piece.path} holds no document: remove it from the input")


def _open_zstd(path: str, raw: IO[bytes]) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise SetupError(
            f"{path} needs the package zstandard: pip install 'megacpt[zstd]' (or pip install zstandard)"
        ) from error
    return io.BufferedReader(_ZstdFrames(zstandard, raw), 1 << 20)


class _ZstdFrames(io.RawIOBase):
    """The content of a file of zstd frames.

    The package's own stream reader takes the end of a file that is cut short for the end of the content.
    """

    def __init__(self, zstandard: Any, raw: IO[bytes]) -> None:
        self._zstandard = zstandard
        self._raw = raw
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._raw.read(1 << 16)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._ready = memoryview(self._decompress(compressed))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, compressed: bytes) -> bytes:
        content = []
        while compressed:
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                content.append(self._frame.decompress(compressed))
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            compressed = b""
            if self._frame.eof:
                compressed, self._frame = self._frame.unused_data, None
        return b"".join(content)


class _LineError(Exception):
    """What is wrong with a line; the caller knows which."""


def _parse(line: bytes, fields: _Fields, first: bool) -> Document | None:
    """Return the document of one JSON line, or None for a blank line; how much was consumed the caller knows."""
    try:
        decoded = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise _LineError(_utf8_problem(error)) from error
    if not decoded.strip():
        return None
    try:
        record = json.loads(decoded)
    except ValueError as error:
        raise _LineError(f"this is not JSON: {error}") from error
    except RecursionError as error:
        raise _LineError("this JSON is nested too deeply") from error
    if not isinstance(record, dict):
        raise _LineError(f"an object with the field {fields.text!r} is expected, not a {type(record).__name__}")
    if missing := fields.missing(list(record)):
        raise _LineError(missing)
    return _checked(record[fields.text], None if fields.score is None else record[fields.score], fields)


def _checked(text: object, score: object, fields: _Fields) -> Document:
    field = fields.text
    if not isinstance(text, str):
        raise _LineError(f"the field {field!r} should be text, not {type(text).__name__}")
    number = None
    if fields.score is not None:
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise _LineError(f"the field {fields.score!r} should be a finite number, the score, not {score!r:.50}")
        number = float(score)
    try:
        return Document(text, len(text.encode()), 0, number)
    except UnicodeEncodeError as error:
        raise _LineError(
            f"the field {field!r} holds half a surrogate pair ({text[error.start]!a}) at character "
            f"{error.start}, which is no valid Unicode text"
        ) from error


def _read_parquet(piece: Piece, fields: _Fields) -> Iterator[Document]:
    from pyarrow import ArrowInvalid

    file = open_parquet(piece.path)
    if missing := fields.missing(file.schema_arrow.names):
        raise DataError(f"{piece.path}: {missing}")
    groups = list(range(piece.start, piece.stop))
    row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
    rows = sum(file.metadata.row_group(group).num_rows for group in groups)
    consumed = piece.weight / max(rows, 1)
    try:
        columns = [name for name in fields if name is not None]
        for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=columns):
            scores = iter(()) if fields.score is None else iter(batch.column(fields.score))
            for value, score in zip_longest(batch.column(fields.text), scores):
                row += 1
                found = _checked(value.as_py(), None if score is None else score.as_py(), fields)
                yield found._replace(consumed=round(row * consumed) - round((row - 1) * consumed))
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{piece.path}, row {row}", error) from error
    except _LineError as error:
        raise DataError(f"{piece.path}, row {row}: {error}") from error
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{piece.path} is damaged near row {row}: {error}") from error


def _utf8_problem(error: UnicodeDecodeError) -> str:
    return (
        f"this is not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start} ({error.reason}); "
        "convert the file to UTF-8, for example with iconv"
    )


def _not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{where}: {_utf8_problem(error)}")
