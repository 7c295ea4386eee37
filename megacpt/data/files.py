"""Writing files so that a crash leaves the old or the new content, never half of it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
}


def disk_full(error: OSError) -> str | None:
    """Return in words which storage limit `error` tells of, or None when it is about something else."""
    return _FULL.get(error.errno or 0)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable (a rename is only safe on disk after that)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to a temporary name, flush it to disk, then rename it to `path`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)
