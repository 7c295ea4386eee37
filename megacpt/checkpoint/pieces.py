"""Checkpoints piece by piece: what is stored of each global tensor, read and written without holding a whole model.

A piece is a block of a global tensor, as one rank once wrote it. Pieces are read whatever layout wrote them, and a new
checkpoint is computed a piece at a time, while it is written.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megacpt.checkpoint.tensors import OPTIMIZER, check_metadata, explained
from megacpt.errors import CheckpointError
from megacpt.runtime.layout import is_first_rank

COMMON = "common.pt"
_Make = Callable[["Piece"], Tensor]


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
        place = self.metadata.storage_data[_index(piece)]
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


def write_pieces(folder: Path, pieces: Sequence[Piece], make: Callable[[Piece], Tensor], workers: int = 1) -> None:
    """Write a checkpoint's tensors, each block computed when its turn comes; every rank calls this, and does its part.

    The result has the format of Megatron Core's distributed checkpoints (``torch_dist``), with a file for each block.

    Args:
        folder: an empty folder.
        pieces: blocks that make up whole tensors.
        make: returns the numbers of a block on the CPU, in memory of its own, which is freed once they are written.
        workers: threads of a rank that make blocks ahead, so many beside the one that is written; 1 makes each when
            its turn comes.

    Raises:
        CheckpointError: if the disk is full or fails, or as `make` does.
    """
    # The largest first, dealt out in turns: a rank more or less than the others has little more to do.
    in_order = sorted(pieces, key=lambda piece: (-piece.numel, piece.name, piece.offsets))
    mine = in_order[dist.get_rank() :: dist.get_world_size()]
    with explained(folder), _our_errors(), _ahead(mine, make, workers) as made:
        # One file a block: the writer holds a whole file's tensors until that file is complete.
        writer = dcp.FileSystemWriter(str(folder), single_file_per_rank=False)
        dcp.save({}, storage_writer=writer, planner=_Computed(mine, made))
        if is_first_rank():
            torch.save({}, folder / COMMON)
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))


@contextmanager
def _ahead(pieces: Sequence[Piece], make: _Make, workers: int) -> Iterator[_Make]:
    """Have the blocks that come next made by threads while one is written, asked for in the order of `pieces`."""
    if workers == 1:
        yield make
        return
    waiting = iter(pieces)
    running: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(workers) as pool:

        def made(_: Piece) -> Tensor:
            while len(running) < workers + 1 and (following := next(waiting, None)) is not None:
                running.append(pool.submit(make, following))
            return running.popleft().result()

        try:
            yield made
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _our_errors() -> Iterator[None]:
    """Pass on the error of a rank in place of the one that torch wraps around it."""
    try:
        yield
    except dcp.CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, CheckpointError):
                raise failure from error
        raise


class _Computed(SavePlanner):
    """Has each block made at the moment at which it is written."""

    def __init__(self, pieces: Sequence[Piece], make: Callable[[Piece], Tensor]) -> None:
        self.items = {_index(piece): piece for piece in pieces}
        self.make = make
        self.last = torch.empty(0)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """There is nothing to prepare."""

    def create_local_plan(self) -> SavePlan:
        """Return this rank's blocks."""
        return SavePlan([_write_item(piece) for piece in self.items.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Make the index of everything."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Take the plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Make a block."""
        # The writer holds on to the block that it has written while it asks for the next.
        if (memory := self.last.untyped_storage()).resizable():
            memory.resize_(0)
        self.last = self.make(self.items[write_item.index])
        return self.last


def _same_block(piece: Piece, chunk: ChunkStorageMetadata) -> bool:
    return tuple(chunk.offsets) == piece.offsets and tuple(chunk.sizes) == piece.sizes


def _index(piece: Piece) -> MetadataIndex:
    return MetadataIndex(piece.name, torch.Size(piece.offsets))


def _write_item(piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(piece.shape))
    return WriteItem(_index(piece), WriteItemType.SHARD, tensor_data=data)
