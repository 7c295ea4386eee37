"""A folder of safetensors files with their index, filled one tensor at a time.

A safetensors file is the length of a JSON header (8 bytes, little-endian), the header with the place of every tensor,
and their numbers. All sizes being known before, each tensor is written to its place as it comes, whatever the model's
size.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megacpt.convert.output import appearing, digest_of, slices
from megacpt.data.files import sync
from megacpt.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written.

    Attributes:
        name: in the file.
        dtype: in the file; what is written is converted to it.
        shape: of the tensor.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: in which file, from which byte on."""

    file: str
    start: int
    planned: Planned


class SafetensorsFolder:
    """Writes the planned tensors, in any order, into files of limited size; `new_folder` makes one.

    Args:
        folder: an empty folder.
        plan: every tensor.
        limit: bytes of a file at most, unless one tensor has more.
    """

    def __init__(self, folder: Path, plan: Sequence[Planned], limit: int) -> None:
        self.folder = folder
        self._places: dict[str, _Place] = {}
        self._digests: dict[str, bytes] = {}
        shards = _shards(plan, limit)
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header = self._lay_out(name, shard)
            with (folder / name).open("wb") as file:
                file.write(header)
        total = sum(planned.bytes for planned in plan)
        where = {planned.name: self._places[planned.name].file for planned in plan}
        self.write_text(INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")

    def _lay_out(self, name: str, shard: Sequence[Planned]) -> bytes:
        """Give the tensors of a file their places; return its header."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at, starts = 0, []
        # Wide numbers first, so that all of them begin at a multiple of their width.
        in_order = sorted(shard, key=lambda planned: -planned.dtype.itemsize)
        for planned in in_order:
            span = [at, at + planned.bytes]
            entries[planned.name] = {"dtype": _NAMES[planned.dtype], "shape": planned.shape, "data_offsets": span}
            starts.append(at)
            at += planned.bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for planned, start in zip(in_order, starts, strict=True):
            self._places[planned.name] = _Place(name, 8 + len(text) + start, planned)
        return struct.pack("<Q", len(text)) + text

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, of the planned shape and any dtype, to its place."""
        place = self._places[name]
        if tuple(tensor.shape) != place.planned.shape:
            raise CheckpointError(f"{name} has the shape {list(tensor.shape)}, and {list(place.planned.shape)} is due")
        found = hashlib.sha256()
        with (self.folder / place.file).open("r+b") as file:
            file.seek(place.start)
            for part in slices(tensor, place.planned.dtype):
                found.update(part)
                file.write(part)
        self._digests[name] = found.digest()

    def write_text(self, name: str, text: str) -> None:
        """Write a small file."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a small file."""
        (self.folder / name).write_bytes(content)

    def verify(self) -> None:
        """Flush everything, and compare what is on disk with what was written.

        Raises:
            CheckpointError: if a tensor is missing, or other bytes are read than were written.
        """
        for path in (*self.folder.iterdir(), self.folder):
            sync(path)
        for name, place in self._places.items():
            if name not in self._digests:
                raise CheckpointError(f"{name} was never written")
            path = self.folder / place.file
            if digest_of(path, place.start, place.planned.bytes) != self._digests[name]:
                raise CheckpointError(f"{path} does not hold what was written to it ({name}): the disk is failing")


def _shards(plan: Sequence[Planned], limit: int) -> list[list[Planned]]:
    """Cut the plan, in its order, into files."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for planned in plan:
        if shards[-1] and size + planned.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += planned.bytes
    return shards


@contextmanager
def new_folder(
    out: Path, plan: Sequence[Planned], texts: Mapping[str, str], files: Mapping[str, bytes], limit: int = SHARD_BYTES
) -> Iterator[SafetensorsFolder]:
    """Make a folder of safetensors files; it appears when the block has written every tensor and all are verified.

    Args:
        out: the folder.
        plan: every tensor.
        texts: small files by name.
        files: the same, as bytes.
        limit: see `SafetensorsFolder`.

    Raises:
        ConfigError: if `out` exists.
        CheckpointError: if the disk is full or fails.
    """
    with appearing(out) as temporary:
        temporary.mkdir()
        folder = SafetensorsFolder(temporary, plan, limit)
        for name, text in texts.items():
            folder.write_text(name, text)
        for name, content in files.items():
            folder.write_bytes(name, content)
        yield folder
        folder.verify()
