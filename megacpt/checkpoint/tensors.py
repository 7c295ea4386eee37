"""Tensors to and from disk through Megatron Core's distributed checkpoints (format ``torch_dist``)."""

from __future__ import annotations

import errno
import logging
import os
import pickle
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

import megacpt.checkpoint.reports  # noqa: F401 (each save has a report of its own)
from megacpt.errors import CheckpointError

METADATA = ".metadata"
# Names of what an optimizer keeps begin with this; the others are weights.
OPTIMIZER = "optimizer."
# How a full disk, a used-up quota and a limit on file sizes show: Megatron's writers pass on the text alone, and
# torch's zip writer reports a write that was cut short by the position in the file.
FULL = (*(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)), "unexpected pos")
# What the index of a torch_dist checkpoint is made of. It is a pickle; anything else in it is refused unread.
METADATA_MODULES = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "megatron.core.dist_checkpointing.")
METADATA_NAMES = {
    "torch": {
        "Size", "device", "dtype", "float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32",
        "int64", "bool", "strided", "contiguous_format", "preserve_format", "float8_e4m3fn", "float8_e5m2",
    },
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"set", "frozenset", "list", "dict", "tuple", "int", "str", "slice"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
}  # fmt: skip


class _OnlyMetadata(pickle.Unpickler):
    """Unpickles the index of a checkpoint and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        # A dotted name would be looked up through whatever the module has imported ("os.system").
        if name in METADATA_NAMES.get(module, ()):
            return super().find_class(module, name)
        if (module + ".").startswith(METADATA_MODULES) and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum)):
                return found
        raise CheckpointError(
            f"the checkpoint's {METADATA} refers to {module}.{name}, which no checkpoint index needs; "
            "the file was not written by a checkpoint writer and is not loaded"
        )


def check_metadata(folder: Path) -> Any:
    """Refuse a checkpoint whose index would run foreign code when it is read; return the index.

    Raises:
        CheckpointError: if the index is missing, damaged or refers to anything but checkpoint metadata.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            return _OnlyMetadata(file).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {folder} is no complete checkpoint") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is damaged: {error}") from error


def check_index(folder: Path) -> None:
    """Refuse a checkpoint whose index does not describe its tensor files, each from its first byte to its last.

    It costs no reading: places and lengths are compared with the sizes of the files.

    Raises:
        CheckpointError: as `check_metadata`, or if parts overlap, leave a gap, or belong to no file.
    """
    parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for part in check_metadata(folder).storage_data.values():
        parts[part.relative_path].append((part.offset, part.length))
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.distcp")}
    for name in sorted(parts.keys() | sizes.keys()):
        end = 0
        for offset, length in sorted(parts[name]):
            if offset != end:
                break
            end += length
        if end != sizes.get(name):
            raise CheckpointError(f"{folder / METADATA} does not describe {name}: it ends or breaks at byte {end:,}")


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn a failure of the disk below Megatron's writers into an error that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, CheckpointException, CheckpointingException, RuntimeError) as error:
        text = str(error).strip() or repr(error)
        if any(reason in text for reason in FULL):
            raise CheckpointError(
                f"no space left (or a quota or file size limit reached) while writing {folder}; the checkpoints before "
                "it are untouched. Free some space, or lower checkpoint.keep_last, and run the same command again"
            ) from error
        raise CheckpointError(f"cannot write {folder}: {text.splitlines()[-1]}") from error


def without_what_lacks(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a state without the parts of an optimizer's state that a checkpoint does not hold.

    Args:
        state: an engine's state.
        folder: a checkpoint, perhaps of weights alone, of another optimizer, or with parts that were frozen.

    Raises:
        CheckpointError: as `check_metadata`.
    """
    stored = check_metadata(folder).state_dict_metadata
    return {name: part for name, part in state.items() if part.key in stored or not part.key.startswith(OPTIMIZER)}


def save_tensors(state: dict[str, Any], folder: Path, asynchronous: bool = False) -> AsyncRequest | None:
    """Write this rank's parts of the global tensors in `state` to `folder`; every rank calls this.

    Args:
        state: an engine's state.
        folder: an empty folder, or one that is made.
        asynchronous: return at once with the request that goes on in the background.

    Raises:
        CheckpointError: if the disk is full or fails.
    """
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    with explained(folder):
        request: AsyncRequest | None = dist_checkpointing.save(state, str(folder), async_sharded_save=asynchronous)
    return request


def load_tensors(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read what `state` describes from `folder`, whatever layout wrote it; every rank calls this.

    Args:
        state: an engine's state: which parts of which global tensors this rank wants, and the tensors to fill.
        folder: a checkpoint.

    Returns:
        The same names with loaded tensors.

    Raises:
        CheckpointError: if the checkpoint is damaged or holds another model.
    """
    check_metadata(folder)
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{folder}: common.pt or a tensor file is damaged, or holds more than data") from error
    except (CheckpointingException, CheckpointException, KeyError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(f"{folder} does not fit this model: {reason[0] if reason else error!r}") from error
    return loaded
