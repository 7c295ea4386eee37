"""A run cut anew: the tensors, optimizer and ledger of its checkpoint, in the blocks that another layout reads.

Any layout loads any checkpoint; ranks that have to find their parts in many blocks of others are only slower at it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from megacpt.checkpoint.block_writer import write_pieces
from megacpt.checkpoint.manifest import MANIFEST
from megacpt.checkpoint.pieces import LAYERS, Piece, PieceReader
from megacpt.checkpoint.store import Retention, Store, checkpoint_step, find_checkpoint, verify
from megacpt.config import ModelConfig, dump, load_run
from megacpt.continuation.boundary import RUN, create_run, started
from megacpt.convert.derived import Progress, check_free, counted
from megacpt.errors import CheckpointError, ConfigError
from megacpt.runtime.layout import is_first_rank, start_process_group

# What tensor parallelism cuts: rows of these, columns of those. All else is whole on every rank.
_ROWS = (
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_fc1.weight",
    "linear_fc1.bias",
    "word_embeddings.weight",
    "output_layer.weight",
)
_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
_ROUTED = "mlp.experts."  # the experts of a layer are spread over ranks whole
_COUNTS = "optimizer.count."  # how often a mean was updated: a number a layer


def reshard(checkpoint: Path, out: Path, tensor: int = 1, expert: int = 1, progress: Progress | None = None) -> Path:
    """Write a run folder with a checkpoint of a run, cut for numbers of tensor- and expert-parallel ranks.

    Layers are cut from each other, so that any number of pipeline stages finds whole blocks.

    The ledger is the same, and so is its id: the new run resumes exactly where the checkpoint was. Under torchrun the
    ranks share the work; no more than one block is held at a time.

    Args:
        checkpoint: a checkpoint in its run folder, or that folder for its newest.
        out: a new folder.
        tensor: ranks that share a matrix in the layout that will read it.
        expert: ranks that share the experts of a layer there.
        progress: told after each block: how many of this rank's are written, and how many there are in all.

    Returns:
        The new checkpoint.

    Raises:
        ConfigError: `out` holds a run, or `tensor` or `expert` does not divide a tensor of the model.
        CheckpointError: the checkpoint is damaged or stands outside its run, or the disk fails.
    """
    start_process_group()
    check_free(out)
    folder = find_checkpoint(checkpoint)
    verify(folder)
    start = started(folder.parent.parent)
    if start is None:
        raise CheckpointError(f"{folder} is in no run folder (with start.json), and only a run can be cut anew")
    config = load_run(folder / RUN)
    reader = PieceReader(folder)
    pieces = list(_blocks(reader, config.model, tensor, expert))
    read = counted(reader.read, len(pieces), progress)
    config = config.model_copy(update={"run": out})
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    files = {name: text for name, text in texts.items() if name not in (MANIFEST, "metadata.json")}
    store = Store(out, Retention(last=None))
    step = checkpoint_step(folder)
    made = store.publish(step, lambda place: write_pieces(place, pieces, read), {**files, RUN: dump(config)})
    if is_first_rank():
        create_run(config, start)
    return made


def _blocks(reader: PieceReader, model: ModelConfig, tensor: int, expert: int) -> Iterator[Piece]:
    """Cut every tensor, those of the optimizer too: by layers, and by ranks within."""
    for name, shape in reader.shapes(weights_only=False).items():
        layers = _layer_dims(name)
        counts = [*shape[:layers], *[1] * (len(shape) - layers)]
        dim, count = _cut(name, layers, model, tensor, expert) if not name.startswith(_COUNTS) else (None, 1)
        if dim is not None:
            counts[dim] = count
            if shape[dim] % count:
                option = f"--expert {expert}" if _ROUTED in name else f"--tensor {tensor}"
                raise ConfigError(f"{option} does not divide {name}, whose shape is {list(shape)}: take a divisor")
        sizes = tuple(length // number for length, number in zip(shape, counts, strict=True))
        for index in itertools.product(*map(range, counts)):
            offsets = tuple(i * size for i, size in zip(index, sizes, strict=True))
            yield Piece(name, offsets, sizes, shape, reader.tensors[name].properties.dtype)


def _layer_dims(name: str) -> int:
    """Return how many leading dims number layers: one where those of a model are stacked, none where they are named."""
    behind = name.partition(LAYERS)[2]
    return int(bool(behind) and not behind[0].isdigit())


def _cut(name: str, layers: int, model: ModelConfig, tensor: int, expert: int) -> tuple[int | None, int]:
    """Return which dim of a tensor the ranks share, and in how many blocks; None for what is whole on every rank."""
    if _ROUTED in name:
        return layers, expert
    if name.endswith(_ROWS):
        return layers, tensor * (2 if model.gated and "linear_fc1." in name else 1)
    return (layers + 1, tensor) if name.endswith(_COLUMNS) else (None, 1)
