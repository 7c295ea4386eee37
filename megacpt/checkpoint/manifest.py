"""The manifest of a checkpoint: the size and hash of every file, so that damage is found and named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megacpt.errors import CheckpointError

MANIFEST = "manifest.json"
Described = dict[str, Any]
"""A file: its ``bytes`` and its ``sha256``."""


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    """Python 3.10 has no ``hashlib.file_digest``."""
    found = hashlib.sha256()
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest()


def _share(paths: list[Path]) -> list[Path]:
    """Return this rank's part of the work on `paths`."""
    return paths[dist.get_rank() :: dist.get_world_size()]


def _describe(paths: list[Path]) -> dict[str, Described]:
    with ThreadPoolExecutor(4) as threads:
        return {
            path.name: {"bytes": path.stat().st_size, "sha256": found}
            for path, found in zip(paths, threads.map(digest, paths), strict=True)
        }


def _gather(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def make_manifest(folder: Path, known: Mapping[str, Described] | None = None) -> dict[str, Any]:
    """Describe every file of `folder`, the ranks sharing the reading; every rank calls this and gets the whole.

    Args:
        folder: of the checkpoint.
        known: files that this rank has read back already; nobody reads them again.
    """
    files: dict[str, Described] = {}
    for part in _gather(dict(known or {})):
        files.update(part)
    paths = sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST and p.name not in files)
    for part in _gather(_describe(_share(paths))):
        files.update(part)
    return {"format": 1, "files": dict(sorted(files.items()))}


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what the files of a checkpoint should be: ``bytes`` and ``sha256`` by name.

    Raises:
        CheckpointError: if `folder` holds no manifest, or a damaged one.
    """
    path = folder / MANIFEST
    try:
        files: dict[str, dict[str, Any]] = json.loads(path.read_bytes())["files"]
        for entry in files.values():
            if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
                raise ValueError("it gives no size and hash for every file")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no complete checkpoint: {MANIFEST} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return files


def incomplete(folder: Path) -> str | None:
    """Return what is missing in a checkpoint or has the wrong size, or None; one process alone may ask."""
    try:
        files = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        found = path.stat().st_size
        if found != expected["bytes"]:
            return f"{path} has {found:,} bytes, and should have {expected['bytes']:,}"
    return None


def damage(folder: Path, hashes: bool = True) -> str | None:
    """Return what is wrong with a checkpoint, or None; every rank calls this, and all get the same answer.

    Args:
        folder: the checkpoint.
        hashes: compare contents too, not only sizes.
    """
    wrong = incomplete(folder)
    if wrong is None and hashes:
        wrong = _changed(folder)
    return next((text for text in _gather(wrong) if text), None)


def _changed(folder: Path) -> str | None:
    """Return which file of this rank's part does not have its hash any more, or None."""
    files = read_manifest(folder)
    try:
        found = _describe(_share([folder / name for name in files]))
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    for name, entry in found.items():
        if entry["sha256"] != files[name]["sha256"]:
            return f"{folder / name} has changed since it was written (its hash differs)"
    return None
