"""Megatron's token files: ``PREFIX.bin`` holds the ids, ``PREFIX.idx`` says where documents begin.

Layout of version 1 of the index, little-endian: ``MMIDIDX`` and two zero bytes, version (8 bytes), code of
the id type (1), number of sequences (8), number of document boundaries (8), then lengths (int32) and byte
positions (int64) of the sequences, and the document boundaries (int64) as sequence numbers, from 0.

Documents may have scores: ``PREFIX.scores.npy`` beside them holds a float64 for each. Megatron leaves it alone; the
content hash covers it.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.data.files import sync
from megacpt.errors import DataError

_HEAD = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_TYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16,
}  # fmt: skip
_CODES = {np.dtype(kind): code for code, kind in _TYPES.items()}
# Lengths are int32 in the index, so that a longer document is stored as several sequences.
MAX_SEQUENCE = 2**31 - 1
_CHUNK = 1 << 22


class IndexedTokens:
    """One pair of Megatron token files, memory mapped: opening reads the header and the last entries.

    Raises DataError when a file is missing, is no such file, or has another size than the index says.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.bin_path, self.idx_path = token_files(prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise DataError(f"the token file {path} is missing")
        self._read_index()
        expected, found = self.tokens * self.dtype.itemsize, self.bin_path.stat().st_size
        if found != expected:
            raise DataError(
                f"{self.bin_path} has {found:,} bytes, but its index says {expected:,}: it is "
                f"{'cut short' if found < expected else 'not the file of this index'}; copy or prepare it "
                "again"
            )
        # A mapping of nothing is an error, and an empty stream is not.
        self._ids = np.empty(0, self.dtype)
        if self.tokens:
            self._ids = np.asarray(np.memmap(self.bin_path, self.dtype, mode="r"))

    def _read_index(self) -> None:
        found = self.idx_path.stat().st_size
        with self.idx_path.open("rb") as file:
            head = file.read(_HEAD.size)
        if head.startswith(_MAGIC) and len(head) < _HEAD.size:
            raise DataError(f"{self.idx_path} is cut short: it has {found} bytes, its header alone {_HEAD.size}")
        if not head.startswith(_MAGIC):
            raise DataError(f"{self.idx_path} is not a Megatron index (its first bytes are {head[:9]!r})")
        _, version, code, sequences, boundaries = _HEAD.unpack(head)
        if version != 1 or code not in _TYPES:
            raise DataError(
                f"{self.idx_path} has version {version} and id type {code}; version 1 with whole numbers is expected"
            )
        expected = _HEAD.size + 12 * sequences + 8 * boundaries
        if found < expected or boundaries < 1:
            raise DataError(
                f"{self.idx_path} has {found:,} bytes, but {sequences:,} sequences and {boundaries:,} "
                f"document boundaries need {expected:,}: it is cut short; copy or prepare it again"
            )
        self.dtype: np.dtype[Any] = np.dtype(_TYPES[code])
        self.documents = boundaries - 1
        raw = np.asarray(np.memmap(self.idx_path, np.uint8, mode="r"))
        start, middle = _HEAD.size, _HEAD.size + 4 * sequences
        self.sequence_lengths = raw[start:middle].view(np.int32)
        self._positions = raw[middle : middle + 8 * sequences].view(np.int64)
        self.boundaries = raw[middle + 8 * sequences : expected].view(np.int64)
        if int(self.boundaries[0]) != 0 or int(self.boundaries[-1]) != sequences:
            raise DataError(
                f"{self.idx_path}: the last document should end at sequence {sequences}, not {self.boundaries[-1]}"
            )
        self.tokens = 0
        if sequences:
            self.tokens = int(self._positions[-1]) // self.dtype.itemsize + int(self.sequence_lengths[-1])

    def read(self, offset: int, count: int) -> np.ndarray:
        """Return ids [count] as int64, from position `offset` of the whole file; IndexError outside it."""
        if offset < 0 or count < 0 or offset + count > self.tokens:
            raise IndexError(f"ids {offset} to {offset + count} are outside {self.bin_path}, which has {self.tokens}")
        return self._ids[offset : offset + count].astype(np.int64)

    def read_into(self, ids: np.ndarray, rows: np.ndarray, offsets: np.ndarray) -> None:
        """Fill `rows` int64 [n] of `ids` [m, count] with what `read` returns for `offsets` int64 [n] and count."""
        count = ids.shape[1]
        if len(offsets) and not 0 <= offsets.min() <= offsets.max() <= self.tokens - count:
            raise IndexError(f"ids {offsets.min()} to {offsets.max() + count} are not all inside {self.bin_path}")
        for row, offset in zip(rows.tolist(), offsets.tolist(), strict=True):
            ids[row] = self._ids[offset : offset + count]

    @property
    def scores(self) -> np.ndarray | None:
        """The scores of all documents, float64 [documents], memory mapped; None when they have none."""
        path = score_file(self.bin_path.with_suffix(""))
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DataError(f"{path} is no file of scores: {error}") from error
        if found.dtype != np.float64 or found.shape != (self.documents,):
            raise DataError(f"{path} does not hold a float64 for each of {self.documents:,} documents: copy it again")
        return np.asarray(found)

    def document_ends(self, first: int, last: int) -> np.ndarray:
        """Return the positions in the whole file where documents `first` up to `last` (without it) end, int64 [n]."""
        following = self.boundaries[first + 1 : last + 1]
        ends = np.full(len(following), self.tokens, dtype=np.int64)
        inside = following < len(self._positions)
        ends[inside] = self._positions[following[inside]] // self.dtype.itemsize
        return ends

    def document(self, index: int, limit: int | None = None) -> np.ndarray:
        """Return the ids of document `index`, or the first `limit` of them, as int64 [n]."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} is outside {self.bin_path}, which has {self.documents}")
        first, last = int(self.boundaries[index]), int(self.boundaries[index + 1])
        if first == last:
            return np.empty(0, dtype=np.int64)
        begin = int(self._positions[first]) // self.dtype.itemsize
        end = int(self._positions[last - 1]) // self.dtype.itemsize + int(self.sequence_lengths[last - 1])
        return self.read(begin, end - begin if limit is None else min(limit, end - begin))

    def document_lengths(self, sample: int) -> np.ndarray:
        """Return the lengths in tokens of all documents as int64, at most of `sample` evenly spaced ones."""
        chosen = np.linspace(0, max(self.documents - 1, 0), min(self.documents, sample)).astype(np.int64)
        first, last = self.boundaries[chosen], self.boundaries[chosen + 1]
        lengths = np.zeros(len(chosen), dtype=np.int64)
        lengths[last - first == 1] = self.sequence_lengths[first[last - first == 1]]
        for i in np.flatnonzero(last - first > 1):
            lengths[i] = self.sequence_lengths[first[i] : last[i]].sum(dtype=np.int64)
        return lengths

    def check_positions(self) -> None:
        """Read the whole index; raise DataError unless the sequences follow each other without a gap."""
        expected = 0
        for at in range(0, len(self.sequence_lengths), _CHUNK):
            sizes = self.sequence_lengths[at : at + _CHUNK].astype(np.int64) * self.dtype.itemsize
            ends = expected + np.cumsum(sizes)
            wrong = np.flatnonzero((self._positions[at : at + _CHUNK] != ends - sizes) | (sizes < 0))
            if wrong.size:
                raise DataError(
                    f"{self.idx_path}: sequence {at + int(wrong[0])} does not begin where the one before it ends"
                )
            expected = int(ends[-1])


class IndexedWriter:
    """Writes one pair of Megatron token files, document by document; the index follows on `finish`.

    If `scored`, each document has a score. As a context manager it closes the files on the way out; what was not
    finished has no index and cannot be opened.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[Any], scored: bool = False) -> None:
        self.bin_path, self.idx_path = token_files(prefix)
        self._scores = array("d") if scored else None
        self._scores_path = score_file(prefix)
        self.dtype = dtype
        self.tokens = 0
        self._lengths = array("i")
        self._boundaries = array("q", [0])
        self._bin_hash = sha256()
        self._file = self.bin_path.open("wb")

    @property
    def documents(self) -> int:
        """How many documents have been added."""
        return len(self._boundaries) - 1

    def add(self, ids: np.ndarray, score: float | None = None) -> None:
        """Append one document of ids [n], with its score if this writer writes scores."""
        if self._scores is not None:
            assert score is not None
            self._scores.append(score)
        self._write(ids.astype(self.dtype).tobytes())
        for at in range(0, max(len(ids), 1), MAX_SEQUENCE):
            self._lengths.append(min(MAX_SEQUENCE, len(ids) - at))
        self._boundaries.append(len(self._lengths))
        self.tokens += len(ids)

    def extend(self, source: IndexedTokens, content_hash: str) -> None:
        """Append all documents of `source`; raise DataError unless its content is that of `content_hash`."""
        bin_hash = sha256()
        for chunk in _chunks(source.bin_path):
            bin_hash.update(chunk)
            self._write(chunk)
        scored = [] if self._scores is None else [_hash_file(score_file(source.bin_path.with_suffix("")))]
        if _combine(bin_hash.hexdigest(), _hash_file(source.idx_path), *scored) != content_hash:
            raise DataError(
                f"{source.bin_path} or its index has changed on disk since it was written: delete both, and "
                "prepare again"
            )
        if self._scores is not None and source.scores is not None:
            self._scores.frombytes(source.scores.tobytes())
        self._boundaries.frombytes((source.boundaries[1:] + len(self._lengths)).tobytes())
        self._lengths.frombytes(source.sequence_lengths.tobytes())
        self.tokens += source.tokens

    def finish(self) -> str:
        """Flush the ids to disk, write the index, and return the content hash of all."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        idx_hash = sha256()
        with self.idx_path.open("wb") as file:
            for chunk in self._index():
                idx_hash.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return _combine(self._bin_hash.hexdigest(), idx_hash.hexdigest(), *self._finish_scores())

    def _finish_scores(self) -> Iterator[str]:
        """Write the scores, if there are any, and yield their hash."""
        if self._scores is not None:
            np.save(self._scores_path, np.frombuffer(self._scores, dtype=np.float64))
            sync(self._scores_path)
            yield _hash_file(self._scores_path)

    def _write(self, chunk: bytes) -> None:
        self._bin_hash.update(chunk)
        self._file.write(chunk)

    def _index(self) -> Iterator[bytes]:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        yield _HEAD.pack(_MAGIC, 1, _CODES[self.dtype], len(lengths), len(self._boundaries))
        yield lengths.tobytes()
        begin = 0
        for at in range(0, len(lengths), _CHUNK):
            sizes = lengths[at : at + _CHUNK].astype(np.int64) * self.dtype.itemsize
            ends = begin + np.cumsum(sizes)
            yield (ends - sizes).tobytes()
            begin = int(ends[-1])
        yield self._boundaries.tobytes()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def token_files(prefix: str | Path) -> tuple[Path, Path]:
    """Return the ``.bin`` and the ``.idx`` file of `prefix` (whose own dots are kept)."""
    prefix = Path(prefix)
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")


def score_file(prefix: str | Path) -> Path:
    """Return the file with the scores of the documents of `prefix`."""
    prefix = Path(prefix)
    return prefix.with_name(f"{prefix.name}.scores.npy")


def content_hash(prefix: str | Path, progress: Callable[[int], None] | None = None) -> str:
    """Read the files of `prefix` and return their content hash: SHA-256 over the SHA-256 of each.

    They are two, or three where documents have scores: with other scores it is another stream. `progress` is told
    how many bytes have been read since it was last told.
    """
    scores = [score_file(prefix)] if score_file(prefix).is_file() else []
    return _combine(*(_hash_file(path, progress) for path in (*token_files(prefix), *scores)))


def _combine(*digests: str) -> str:
    return sha256(" ".join(digests).encode()).hexdigest()


def _hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    digest = sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
        if progress is not None:
            progress(len(chunk))
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
