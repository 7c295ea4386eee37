"""A checkpoint written a block at a time, each computed when its turn comes; what was interrupted goes on.

The result has the format of Megatron Core's distributed checkpoints (``torch_dist``), with a file for each block. While
it is written a journal beside the blocks says what is complete: a line for each block, with the hash of its file.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future as Promise
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo  # the form in which torch's reader finds a block
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megacpt.checkpoint.manifest import Described, digest
from megacpt.checkpoint.pieces import COMMON, Piece, index_of
from megacpt.checkpoint.tensors import explained
from megacpt.data.files import sync, write_bytes
from megacpt.errors import CheckpointError
from megacpt.runtime.layout import is_first_rank

_JOURNAL = "journal-{}.jsonl"
Make = Callable[[Piece], Tensor]


def write_pieces(
    folder: Path, pieces: Sequence[Piece], make: Make, workers: int = 1, source: str | None = None
) -> dict[str, Described]:
    """Write a checkpoint's tensors; every rank calls this, and does its part.

    Args:
        folder: an empty folder, or what an interrupted call left of it.
        pieces: blocks that make up whole tensors.
        make: returns the numbers of a block on the CPU, in memory of its own, which is freed once they are written.
        workers: threads of a rank that make blocks ahead, so many beside the one that is written; 1 makes each when
            its turn comes.
        source: says what the blocks are made of. Blocks that an interrupted call with the same source has written are
            kept, if their files are whole. None begins anew.

    Returns:
        Size and hash of the files of this rank's blocks, as they were read back.

    Raises:
        CheckpointError: if the disk is full or fails, or as `make` does.
    """
    # The largest first, dealt out in turns: a rank more or less than the others has little more to do.
    in_order = sorted(pieces, key=lambda piece: (-piece.numel, piece.name, piece.offsets))
    mine = in_order[dist.get_rank() :: dist.get_world_size()]
    with explained(folder):
        kept = _kept(folder, source)
    due = [piece for piece in mine if _name(piece) not in kept]
    with explained(folder), _our_errors(), _ahead(due, make, workers) as made:
        dcp.save({}, storage_writer=_Writer(folder, kept, source), planner=_Computed(mine, made))
        if is_first_rank():
            torch.save({}, folder / COMMON)
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    return {name: kept[name] for name in map(_name, mine)}


def _name(piece: Piece) -> str:
    """The file of a block: the same for the same block, whatever ranks there are."""
    said = repr((piece.name, piece.offsets, piece.sizes, piece.shape, piece.dtype))
    return f"{sha256(said.encode()).hexdigest()[:24]}.distcp"


def _kept(folder: Path, source: str | None) -> dict[str, Described]:
    """Return what an interrupted call has left whole, by its file; all else in the folder is removed."""
    lines = [line for journal in sorted(folder.glob(_JOURNAL.format("*"))) for line in _lines(journal)]
    written: dict[str, Described] = {
        line["file"]: {"bytes": line["bytes"], "sha256": line["sha256"]}
        for line in lines
        if source is not None and line["source"] == source
    }
    candidates = [name for name in sorted(written) if (folder / name).is_file()]
    # The ranks share the reading, as it is all of what was written.
    whole = {
        name: written[name]
        for name in candidates[dist.get_rank() :: dist.get_world_size()]
        if digest(folder / name) == written[name]["sha256"]
    }
    everyone: list[dict[str, Described]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, whole)
    found = {name: described for part in everyone for name, described in part.items()}
    if is_first_rank():
        # In a file of its own: the last line of a journal may have been cut off, and nothing may follow it.
        text = "".join(_line(source, name, described) for name, described in found.items())
        write_bytes(folder / _JOURNAL.format("kept"), text.encode())
        for path in folder.iterdir():
            if path.name not in found and path.name != _JOURNAL.format("kept"):
                path.unlink()
    dist.barrier()
    return found


def _line(source: str | None, name: str, described: Described) -> str:
    return json.dumps({"source": source, "file": name, **described}) + "\n"


def _lines(journal: Path) -> list[dict[str, Any]]:
    """The lines of a journal; the last one may have been cut off."""
    found = []
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


class _Writer(dcp.FileSystemWriter):
    """Writes each block into a file of its own, under its name when it is whole.

    Args:
        folder: of the checkpoint.
        kept: what is there, by its file; what is written is added.
        source: see `write_pieces`.
    """

    def __init__(self, folder: Path, kept: dict[str, Described], source: str | None) -> None:
        super().__init__(str(folder), single_file_per_rank=False)
        self.folder, self.kept, self.source = folder, kept, source

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the blocks of a rank, one after the other."""
        assert isinstance(planner, _Computed)
        with (self.folder / _JOURNAL.format(dist.get_rank())).open("a", encoding="utf-8") as journal:
            results = [self._write(item, planner, journal) for item in plan.items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, item: WriteItem, planner: _Computed, journal: Any) -> WriteResult:
        name = _name(planner.items[item.index])
        if name not in self.kept:
            temporary, block = self.folder / f"{name}.partial", planner.resolve_data(item).contiguous()
            whole = block.untyped_storage().nbytes() == block.nbytes  # else more than the block would be saved
            torch.save(block if whole else block.clone(), temporary)
            del block
            sync(temporary)
            self.kept[name] = {"bytes": temporary.stat().st_size, "sha256": digest(temporary)}
            temporary.replace(self.folder / name)
            journal.write(_line(self.source, name, self.kept[name]))
            journal.flush()
            os.fsync(journal.fileno())
        size = self.kept[name]["bytes"]
        return WriteResult(item.index, size, _StorageInfo(name, 0, size))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, and remove what belongs to the writing alone."""
        used = {result.storage_data.relative_path for part in results for result in part}
        for path in self.folder.iterdir():
            if path.name not in used:
                path.unlink()
        super().finish(metadata, results)


@contextmanager
def _ahead(pieces: Sequence[Piece], make: Make, workers: int) -> Iterator[Make]:
    """Have the blocks that come next made by threads while one is written, asked for in the order of `pieces`."""
    if workers == 1:
        yield make
        return
    waiting = iter(pieces)
    running: deque[Promise[Tensor]] = deque()
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
            if isinstance(failure, CheckpointError | KeyboardInterrupt):
                raise failure from error
        raise


class _Computed(SavePlanner):
    """Has each block made at the moment at which it is written."""

    def __init__(self, pieces: Sequence[Piece], make: Make) -> None:
        self.items = {index_of(piece): piece for piece in pieces}
        self.make = make

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
        return self.make(self.items[write_item.index])


def _write_item(piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(piece.shape))
    return WriteItem(index_of(piece), WriteItemType.SHARD, tensor_data=data)
