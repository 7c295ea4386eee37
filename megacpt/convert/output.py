"""Files and folders that appear under their names only when they are whole."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megacpt.data.files import disk_full, sync
from megacpt.errors import CheckpointError, ConfigError

_SLICE = 1 << 20  # numbers that are converted at a time


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Give a temporary path beside `out`; what is there takes its name when the block ends well, and goes otherwise.

    The block flushes the files that it writes.

    Raises:
        ConfigError: if `out` exists.
        CheckpointError: if the disk is full or fails.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: choose another --out, or remove it")
    temporary = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        temporary.replace(out)
        sync(out.parent)
    except OSError as error:
        why = disk_full(error) or error.strerror or str(error)
        raise CheckpointError(f"cannot write {out}: {why}; nothing is left of it") from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def slices(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """Yield the bytes of a contiguous tensor as `dtype`, converted a megabyte or so at a time."""
    for part in tensor.reshape(-1).split(_SLICE):
        yield memoryview(part.to(dtype).view(torch.uint8).numpy())


def digest_of(path: Path, start: int, length: int) -> bytes:
    """Return the SHA-256 of a stretch of a file, as it is read back."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while length > 0 and (block := file.read(min(length, 1 << 20))):
            found.update(block)
            length -= len(block)
    return found.digest()
