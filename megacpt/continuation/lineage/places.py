"""Where the streams of a lineage are now: at the path that a ledger wrote down, or wherever their content is found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from megacpt.data.indexed import content_hash, score_file, token_files
from megacpt.data.stream import META_FILE, StreamMeta, TokenStream
from megacpt.errors import DataError

# Folders of a run, which hold no streams and may hold very many files.
_SKIPPED = ("checkpoints", "tensorboard", "logs")


class StreamPlaces:
    """Finds streams by their content hash.

    Args:
        folders: searched, with all that is below them, for what is not where a ledger says.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._found: dict[str, Path] | None = None

    def find(self, wanted: str, hints: Iterable[str]) -> Path | None:
        """Return the folder of the stream whose description has this content hash, or None.

        Args:
            wanted: the content hash.
            hints: where it was.
        """
        for hint in hints:
            if _described(Path(hint)) == wanted:
                return Path(hint)
        if self._found is None:
            self._found = dict(self._search())
        return self._found.get(wanted)

    def _search(self) -> Iterable[tuple[str, Path]]:
        for folder in self._folders:
            for name, inner, files in os.walk(folder):
                inner[:] = [below for below in inner if below not in _SKIPPED and not below.startswith(".")]
                if META_FILE in files and (described := _described(Path(name))) is not None:
                    yield described, Path(name)


def _described(folder: Path) -> str | None:
    """Return the content hash that a stream's description names, or None where there is no stream."""
    if not (folder / META_FILE).is_file():
        return None
    try:
        return StreamMeta.read(folder).content_hash
    except DataError:
        return None


def stream_bytes(folder: Path) -> int:
    """Return how many bytes the files of a stream have."""
    prefix = folder / StreamMeta.read(folder).files
    return sum(path.stat().st_size for path in (*token_files(prefix), score_file(prefix)) if path.is_file())


def check_stream(folder: Path, wanted: str, fingerprints: Iterable[str], advance: Callable[[int], None] | None) -> None:
    """Check that a stream is the one with the content hash `wanted`.

    Args:
        folder: the stream.
        wanted: the content hash.
        fingerprints: of the tokenizers of the ledgers that name it.
        advance: told how many bytes have been read since it was last told. None to compare sizes only.

    Raises:
        DataError: if it is not.
    """
    stream = TokenStream.open(folder)
    for fingerprint in fingerprints:
        if stream.meta.tokenizer_fingerprint != fingerprint:
            raise DataError(
                f"the stream {folder} was made with the tokenizer {stream.meta.tokenizer_fingerprint[:12]}, the ledger "
                f"names {fingerprint[:12]}"
            )
    if advance is None:
        return
    stream.indexed.check_positions()
    found = content_hash(folder / stream.meta.files, advance)
    if found != wanted:
        raise DataError(
            f"the content of {stream.indexed.bin_path} (or its .idx) has changed: its hash is {found[:16]}, the ledger "
            f"says {wanted[:16]}"
        )
