"""Windows in the rising order of their scores.

A document's score comes from ``data prepare --score FIELD``. A window's score is the mean over its `seq_length` inputs
of the scores of the documents that they belong to. Windows of equal score (those of one long document, say) are
ranked by a fixed hash, so that they do not follow each other as they stand in the stream.

The ranking is made once for a stream, a `seq_length` and a set of windows, and kept in a file beside the stream (or,
where that cannot be written, in the user's cache): then opening it costs nothing, whatever its size. Making it takes
memory for three numbers a window.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megacpt.data.files import disk_full, sync
from megacpt.data.stream import TokenStream
from megacpt.errors import DataError

_CHUNK = 1 << 18


def ranked_windows(
    stream: TokenStream, seq_length: int, label: str = "all", chosen: Callable[[], np.ndarray] | None = None
) -> np.ndarray:
    """Return windows [n] of `stream` in the rising order of their scores, memory mapped.

    They are all windows, or those that `chosen` returns; `label` names this set in the name of the file.

    Raises DataError when the stream has no scores, or the ranking cannot be written.
    """
    if stream.indexed.scores is None:
        raise DataError(
            f"the stream {stream.folder} has no scores to choose or order its samples by: prepare it again with "
            "'megacpt data prepare ... --score FIELD', where FIELD holds a number for each document"
        )
    name = f"{stream.meta.name}.ranks-{stream.meta.content_hash[:16]}-{seq_length}-{label}.npy"
    places = [stream.folder / name, _cache() / name]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        windows = np.arange((stream.tokens - 1) // seq_length) if chosen is None else chosen()
        scores = np.concatenate(list(window_scores(stream, seq_length)))[windows]
        order = np.lexsort((_shuffled(windows), scores))
        found = _write(places, windows[order].astype(np.min_scalar_type(max(int(windows.max()), 1))))
    return np.asarray(np.load(found, mmap_mode="r", allow_pickle=False))


def window_scores(stream: TokenStream, seq_length: int, chunk: int = _CHUNK) -> Iterator[np.ndarray]:
    """Yield the scores of all windows of `stream` in their order: float64 [chunk] at a time."""
    scores, indexed = stream.indexed.scores, stream.indexed
    assert scores is not None
    windows = (stream.tokens - 1) // seq_length
    document = 0
    for first in range(0, windows, chunk):
        edges = np.arange(first, min(first + chunk, windows) + 1) * seq_length
        until = _document_at(stream, int(edges[-1]) - 1) + 1
        ends = indexed.document_ends(document, until)
        # Every cut between documents or windows begins a stretch of one document in one window.
        cuts = np.unique(np.concatenate([edges, ends[(ends > edges[0]) & (ends < edges[-1])]]))
        owners = document + np.searchsorted(ends, cuts[:-1], side="right")
        parts = scores[owners] * np.diff(cuts)
        yield np.add.reduceat(parts, np.searchsorted(cuts, edges[:-1])) / seq_length
        document = until - 1


def _document_at(stream: TokenStream, position: int) -> int:
    """Return the document that the token at `position` belongs to, by bisection."""
    low, high = 0, stream.documents - 1
    while low < high:
        middle = (low + high) // 2
        if int(stream.indexed.document_ends(middle, middle + 1)[0]) > position:
            high = middle
        else:
            low = middle + 1
    return low


def _shuffled(windows: np.ndarray) -> np.ndarray:
    """Return a number for each window in which neighbours have nothing in common (a bijection of 64 bits)."""
    mixed: np.ndarray = windows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return mixed


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megacpt"


def _write(places: list[Path], ranks: np.ndarray) -> Path:
    """Write `ranks` in the first of `places` that can be written, and return it; several ranks may do so at once."""
    problem: OSError | None = None
    for path in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
                try:
                    np.save(file, ranks)
                    file.flush()
                    os.fsync(file.fileno())
                    Path(file.name).replace(path)
                except OSError:
                    Path(file.name).unlink(missing_ok=True)
                    raise
            sync(path.parent)
            return path
        except OSError as error:
            problem = problem or error
    assert problem is not None
    raise DataError(f"{places[0]} cannot be written: {disk_full(problem) or problem.strerror}") from problem
