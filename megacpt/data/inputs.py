"""Finding the input files and cutting them into shards: the same ones for any number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import Any, Literal

from megacpt.errors import DataError, SetupError

Kind = Literal["text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"]
_KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Piece:
    """A stretch of one input file.

    `start` and `stop` are bytes of a ``jsonl`` file (lines that begin there), row groups of a ``parquet``
    file, and 0 and 1 for kinds that are read whole. `size` in bytes and `modified` in nanoseconds identify
    the file; `weight` is about how many bytes of it this piece covers.
    """

    path: str
    kind: Kind
    start: int
    stop: int
    size: int
    modified: int
    weight: int

    def check_unchanged(self) -> None:
        """Raise DataError when the file is no longer the one that was cut."""
        status = Path(self.path).stat()
        if (status.st_size, status.st_mtime_ns) != (self.size, self.modified):
            raise DataError(f"{self.path} has changed while it was being read: run the same command again")


Shard = tuple[Piece, ...]


def shard_name(shard: Shard) -> str:
    """Return a name that changes when a file of the shard, or the stretch of it, does."""
    return sha256(dumps([asdict(piece) for piece in shard]).encode()).hexdigest()[:20]


def find_files(inputs: Sequence[str | Path]) -> list[list[Piece]]:
    """Return the files of each of `inputs` (files, or folders of any depth) as whole pieces, sorted by path.

    Raises DataError for a missing, empty or unknown file, for a folder without any, and for a file given
    twice.
    """
    if not inputs:
        raise DataError("there is no input: give at least one file or folder")
    found = [[_whole(path) for path in _expand(Path(entry).absolute())] for entry in inputs]
    seen: set[str] = set()
    for piece in (piece for pieces in found for piece in pieces):
        if piece.path in seen:
            raise DataError(f"{piece.path} is given twice: its documents would be in the stream twice")
        seen.add(piece.path)
    return found


def describe(inputs: Sequence[str | Path], found: Sequence[Sequence[Piece]]) -> list[dict[str, Any]]:
    """Return, for each input, its path, its files, their bytes, and a hash over names, sizes and times."""
    described = []
    for entry, pieces in zip(inputs, found, strict=True):
        listing = "\n".join(f"{piece.path}\t{piece.size}\t{piece.modified}" for piece in pieces)
        described.append(
            {
                "path": str(Path(entry).absolute()),
                "files": len(pieces),
                "bytes": sum(piece.size for piece in pieces),
                "listing": sha256(listing.encode(errors="surrogateescape")).hexdigest(),
            }
        )
    return described


def cut(files: Sequence[Piece], target: int) -> list[Shard]:
    """Cut large files and gather small ones into shards of about `target` bytes, in order."""
    shards: list[Shard] = []
    gathered: list[Piece] = []
    weight = 0
    for file in files:
        for piece in _cut_file(file, target):
            gathered.append(piece)
            weight += piece.weight
            if weight >= target:
                shards.append(tuple(gathered))
                gathered, weight = [], 0
    if gathered:
        shards.append(tuple(gathered))
    return shards


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        inside = (entry.relative_to(path) for entry in path.rglob("*") if entry.is_file())
        visible = [name for name in inside if not any(part.startswith(".") for part in name.parts)]
        chosen = sorted((name for name in visible if _kind(name)), key=lambda name: name.as_posix())
        if not chosen:
            raise DataError(f"the folder {path} holds no input file ({', '.join(_KINDS)})")
        return [path / name for name in chosen]
    if not path.is_file():
        raise DataError(f"there is no input {path}")
    return [path]


def _kind(path: Path) -> Kind | None:
    name = path.name.lower()
    return next((kind for suffix, kind in _KINDS.items() if name.endswith(suffix)), None)


def _whole(path: Path) -> Piece:
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{path} is of no known kind: inputs end with {', '.join(_KINDS)}")
    status = path.stat()
    if status.st_size == 0:
        raise DataError(f"{path} is empty: remove it from the input")
    stop = status.st_size if kind == "jsonl" else 1
    return Piece(str(path), kind, 0, stop, status.st_size, status.st_mtime_ns, status.st_size)


def _cut_file(file: Piece, target: int) -> Iterator[Piece]:
    if file.kind == "jsonl":
        for start in range(0, file.size, target):
            stop = min(start + target, file.size)
            yield replace(file, start=start, stop=stop, weight=stop - start)
    elif file.kind == "parquet":
        yield from _cut_parquet(file, target)
    else:
        yield file


def _cut_parquet(file: Piece, target: int) -> Iterator[Piece]:
    metadata = open_parquet(file.path).metadata
    groups = metadata.num_row_groups
    if metadata.num_rows == 0:
        raise DataError(f"{file.path} holds no row: remove it from the input")
    together = max(1, groups * target // file.size)
    for start in range(0, groups, together):
        stop = min(start + together, groups)
        yield replace(file, start=start, stop=stop, weight=file.size * stop // groups - file.size * start // groups)


def open_parquet(path: str) -> Any:
    """Open a Parquet file; DataError when it is none, SetupError when pyarrow is missing."""
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise SetupError(
            f"{path} needs the package pyarrow: pip install 'megacpt[parquet]' (or pip install pyarrow)"
        ) from error
    try:
        return ParquetFile(path)
    except ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file, or damaged: {error}") from error
