"""What the ranks of a pool run: writing a checkpoint in blocks, stopped in the middle, and again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacpt.checkpoint.block_writer import write_pieces
from megacpt.checkpoint.pieces import Piece, PieceReader
from megacpt.errors import CheckpointError
from megacpt.runtime.layout import start_process_group

SHAPE = (5, 6, 4)
NAMES = ("first", "second")
PIECES = [
    Piece(name, (layer, 0, 0), (1, *SHAPE[1:]), SHAPE, torch.float32) for name in NAMES for layer in range(SHAPE[0])
]


def _block(piece: Piece) -> Tensor:
    """Numbers that are a view of more, as rows of a larger tensor are."""
    first = 100 * NAMES.index(piece.name) + piece.offsets[0]
    whole = torch.arange(2 * piece.numel, dtype=torch.float32).view(2, *piece.sizes) + first
    return whole[1]


def write(
    folder: str, source: str | None, stop: int | None = None, workers: int = 1, error: str = "KeyboardInterrupt"
) -> dict[str, Any]:
    """Write the blocks, stopped at the block `stop` of a rank; ``made``: how many all ranks made, ``ended`` by what."""
    start_process_group()
    Path(folder).mkdir(parents=True, exist_ok=True)
    made = 0

    def make(piece: Piece) -> Tensor:
        nonlocal made
        if made == stop and dist.get_rank() == 0:
            raise KeyboardInterrupt if error == "KeyboardInterrupt" else CheckpointError("a bad number")
        made += 1
        return _block(piece)

    ended = "well"
    try:
        write_pieces(Path(folder), PIECES, make, workers, source)
    except (KeyboardInterrupt, CheckpointError) as stopped:
        ended = type(stopped).__name__
    counts: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(counts, made)
    return {"made": sum(counts), "ended": ended}


def right(folder: str) -> bool:
    """Whether a checkpoint holds every number, in files of its blocks alone."""
    reader = PieceReader(Path(folder))
    files = {path.name for path in Path(folder).iterdir()} - {".metadata", "common.pt", "metadata.json"}
    sizes = {(Path(folder) / name).stat().st_size for name in files}
    alone = len(files) == len(PIECES) and max(sizes) < 3000
    return alone and all(torch.equal(reader.read(piece), _block(piece)) for piece in PIECES)


def journal(folder: str) -> list[dict[str, Any]]:
    """The lines of all journals."""
    lines = [line for path in sorted(Path(folder).glob("journal-*")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]
