"""Checkpoints piece by piece: what is stored of each global tensor, read without holding a whole model.

A piece is a block of a global tensor, as one rank once wrote it. Pieces are read whatever layout wrote them;
`block_writer` writes a new checkpoint of them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megacpt.checkpoint.tensors import OPTIMIZER, check_metadata
from megacpt.errors import CheckpointError

COMMON = "common.pt"
LAYERS = "decoder.layers."
"""How names of a layer's tensors begin; its number follows, unless layers are stacked in a leading dim."""


@dataclass(frozen=True)
class Piece:
    """A block of a global tensor.

    Attributes:
        name: of the tensor.
        offsets: where the block begins, a number a dim.
        sizes: its extents.
        shape: of the whole tensor.
        dtype: of its numbers.
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Numbers in the block."""
        return torch.Size(self.sizes).numel()


class PieceReader:
    """Reads blocks of the tensors of one checkpoint.

    Args:
        folder: the checkpoint.

    Raises:
        CheckpointError: if its index is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        check_metadata(folder)  # before anything unpickles it
        self.folder = folder
        self.reader = dcp.FileSystemReader(str(folder))
        self.metadata: Metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        found = self.metadata.state_dict_metadata
        self.tensors = {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}

    def shapes(self, weights_only: bool = True) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name; with `weights_only`, not those of the optimizer."""
        return {
            name: tuple(entry.size)
            for name, entry in sorted(self.tensors.items())
            if not (weights_only and name.startswith(OPTIMIZER))
        }

    def pieces(self, weights_only: bool = True) -> list[Piece]:
        """Return the blocks that are stored, in the order of names and offsets; `weights_only` as in `shapes`."""
        return [
            Piece(name, tuple(chunk.offsets), tuple(chunk.sizes), shape, self.tensors[name].properties.dtype)
            for name, shape in self.shapes(weights_only).items()
            for chunk in sorted(self.tensors[name].chunks, key=lambda chunk: tuple(chunk.offsets))
        ]

    def read(self, piece: Piece) -> Tensor:
        """Return the numbers of a block, [*sizes], of whatever stored blocks they are parts.

        Raises:
            CheckpointError: if the checkpoint lacks the tensor, has it in another shape, or a file is damaged.
        """
        entry = self.tensors.get(piece.name)
        if entry is None or tuple(entry.size) != piece.shape:
            has = "no such tensor" if entry is None else f"one of shape {tuple(entry.size)}"
            raise CheckpointError(f"{self.folder} should hold {piece.name} of shape {piece.shape}, and has {has}")
        if any(_same_block(piece, chunk) for chunk in entry.chunks):
            return self._stored(piece)
        block = torch.empty(piece.sizes, dtype=entry.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
        items = create_read_items_for_chunk_list(piece.name, entry, [chunk])
        if sum(torch.Size(item.lengths).numel() for item in items) != piece.numel:
            raise CheckpointError(f"{self.folder} is damaged: it lacks a part of {piece.name}")
        try:
            self.reader.read_data(LoadPlan(items), _Into(block)).wait()
        except Exception as error:  # a damaged file can raise anything
            raise CheckpointError(f"{self.folder} is damaged: {piece.name} cannot be read ({error})") from error
        return block

    def _stored(self, piece: Piece) -> Tensor:
        """Return a block that is stored as such, without a second copy in memory."""
        place = self.metadata.storage_data[index_of(piece)]
        try:
            with (self.folder / place.relative_path).open("rb") as file:
                stretch = cast("BinaryIO", _Stretch(file, place.offset, place.length))
                found: Tensor = torch.load(stretch, map_location="cpu", weights_only=True)
            return found.view(piece.sizes)
        except Exception as error:  # a damaged file can raise anything
            raise CheckpointError(f"{self.folder} is damaged: {piece.name} cannot be read ({error})") from error


class _Stretch(io.RawIOBase):
    """So many bytes of an open file, from `start` on, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        file.seek(start)

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, counted from the beginning, from here or from the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        return self._file.seek(self._start + base + offset) - self._start

    def tell(self) -> int:
        """Return the place."""
        return self._file.tell() - self._start

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, as far as the stretch goes."""
        view = memoryview(buffer).cast("B")
        return self._file.readinto(view[: max(0, self._length - self.tell())])  # type: ignore[attr-defined, no-any-return]


class _Into(DefaultLoadPlanner):
    """Puts what is read into one block."""

    def __init__(self, block: Tensor) -> None:
        super().__init__()
        self.block = block

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of the block that `read_item` fills."""
        part = self.block
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It is in its place already."""


def _same_block(piece: Piece, chunk: ChunkStorageMetadata) -> bool:
    return tuple(chunk.offsets) == piece.offsets and tuple(chunk.sizes) == piece.sizes


def index_of(piece: Piece) -> MetadataIndex:
    """Return a block's place in the index of a checkpoint."""
    return MetadataIndex(piece.name, torch.Size(piece.offsets))
