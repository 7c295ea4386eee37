"""What the ranks of a pool run: making runs, averaging their checkpoints, and averaging the gathered way."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megacpt.checkpoint.pieces import Piece, PieceReader
from megacpt.config import RunConfig
from megacpt.continuation.opened import open_model
from megacpt.convert.average import average
from megacpt.data.stream import TokenStream
from megacpt.errors import MegacptError
from megacpt.evaluate.loss import evaluate_stream
from megacpt.train.run import train


def make_run(config: dict[str, Any], parent: str | None = None) -> str:
    """Train a run to its end; return its folder."""
    run = RunConfig.model_validate(config)
    train(run, None if parent is None else Path(parent))
    return str(run.run)


def averaged(sources: list[str], out: str, weights: list[float] | None = None) -> dict[str, Any]:
    """Average, and say what came of it; ``blocks``: what this rank read, as (checkpoint, name, numbers)."""
    blocks: list[tuple[str, str, int]] = []
    told: list[tuple[int, int]] = []
    original = PieceReader.read

    def read(self: PieceReader, piece: Piece) -> Tensor:
        blocks.append((str(self.folder), piece.name, piece.numel))
        return original(self, piece)

    PieceReader.read = read  # type: ignore[method-assign]
    try:
        made = average([Path(source) for source in sources], Path(out), weights, lambda *step: told.append(step))
    except MegacptError as error:
        return {"error": (type(error).__name__, str(error))}
    finally:
        PieceReader.read = original  # type: ignore[method-assign]
    return {"checkpoint": str(made), "blocks": blocks, "told": told}


def weights(checkpoint: str) -> dict[str, np.ndarray]:
    """The weights of a checkpoint, whole, as the engine of one rank loads them."""
    engine, _, _ = open_model(Path(checkpoint))
    state = engine.state()
    return {name: part.data.detach().numpy().copy() for name, part in state.items() if hasattr(part, "data")}


def gathered_mean(sources: list[str], shares: list[float]) -> dict[str, np.ndarray]:
    """The mean of whole models in float64, rounded once."""
    loaded = [weights(source) for source in sources]
    pairs = list(zip(loaded, np.array(shares) / np.sum(shares), strict=True))
    return {
        name: sum((share * found[name].astype(np.float64) for found, share in pairs), np.float64()).astype(np.float32)
        for name in loaded[0]
    }


def same_as_gathered(made: str, sources: list[str], shares: list[float]) -> dict[str, float]:
    """Largest difference of each weight of `made` from the mean of the whole models, in units of its last place."""
    mean = gathered_mean(sources, shares)
    return {
        name: float(np.max(np.abs(value - mean[name]) / np.spacing(np.abs(mean[name]))))
        for name, value in weights(made).items()
    }


def loss(checkpoint: str, stream: str) -> float:
    """Loss of a checkpoint on a stream."""
    engine, tokenizer, config = open_model(Path(checkpoint))
    found = TokenStream.open(Path(stream), tokenizer=tokenizer)
    return evaluate_stream(engine, "stream", found, config.batch.seq_length, 500, 2).loss


def stored(checkpoint: str) -> dict[str, int]:
    """How many blocks there are of each tensor of a checkpoint, with those of the optimizer."""
    found: dict[str, int] = {}
    for piece in PieceReader(Path(checkpoint)).pieces(weights_only=False):
        found[piece.name] = found.get(piece.name, 0) + 1
    return found


def reread(checkpoint: str, parts: int) -> bool:
    """Whether every tensor, read in other blocks than it is stored in, is what the stored blocks say."""
    reader = PieceReader(Path(checkpoint))
    whole = {name: torch.zeros(shape) for name, shape in reader.shapes().items()}
    dtypes = {piece.name: piece.dtype for piece in reader.pieces()}
    for piece in reader.pieces():
        where = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))
        whole[piece.name][where] = reader.read(piece)
    for name, tensor in whole.items():
        edges = np.linspace(0, tensor.shape[-1], parts + 1).astype(int)
        for first, last in itertools.pairwise(edges):
            head = tuple(tensor.shape[:-1])
            block = Piece(
                name, (*[0] * len(head), int(first)), (*head, int(last - first)), tuple(tensor.shape), dtypes[name]
            )
            if first < last and not torch.equal(reader.read(block), tensor[..., first:last]):
                return False
    return True


def made(operation: str, out: str, **arguments: Any) -> dict[str, Any]:
    """Make a checkpoint from others; ``checkpoint``: where it is, or ``error``: kind and text."""
    from megacpt.convert import average as averages
    from megacpt.convert.reshard import reshard
    from megacpt.convert.resize_vocab import resize_vocab

    try:
        if operation == "task_vectors":
            tuned = [(Path(path), scale) for path, scale in arguments["tuned"]]
            found = averages.task_vectors(Path(arguments["base"]), tuned, Path(out))
        else:
            run = {"reshard": reshard, "resize_vocab": resize_vocab}[operation]
            found = run(Path(arguments.pop("checkpoint")), Path(out), **arguments)  # type: ignore[operator]
    except MegacptError as error:
        return {"error": (type(error).__name__, str(error))}
    return {"checkpoint": str(found)}


def spoiled(checkpoint: str, out: str, name: str) -> str:
    """A folder of tensors as those of a checkpoint, with one number of layer 1 of a tensor made none."""
    from megacpt.checkpoint.block_writer import write_pieces

    reader = PieceReader(Path(checkpoint))

    def make(piece: Piece) -> Tensor:
        found = reader.read(piece).clone()
        if piece.name == name and piece.offsets == (1, 0, 0):
            found.view(-1)[3] = float("nan")
        return found

    Path(out).mkdir(parents=True, exist_ok=True)
    write_pieces(Path(out), reader.pieces(), make)
    return out


def whole_weights(checkpoint: str) -> dict[str, np.ndarray]:
    """The weights of a checkpoint, whole, by their names in it."""
    reader = PieceReader(Path(checkpoint))
    return {
        name: reader.read(Piece(name, (0,) * len(shape), shape, shape, torch.float32)).numpy()
        for name, shape in reader.shapes().items()
    }


def different_weights(checkpoints: list[str]) -> list[str]:
    """Names of the weights in which two checkpoints are not bitwise the same."""
    ours, theirs = (whole_weights(folder) for folder in checkpoints)
    both = ours.keys() & theirs.keys()
    return sorted(
        {name for name in both if not np.array_equal(ours[name], theirs[name])} | (ours.keys() ^ theirs.keys())
    )


def whole_state(checkpoints: list[str]) -> list[str]:
    """Names of the tensors, the optimizer's too, in which two checkpoints are not bitwise the same."""
    readers = [PieceReader(Path(folder)) for folder in checkpoints]
    shapes = [reader.shapes(weights_only=False) for reader in readers]
    if shapes[0] != shapes[1]:
        return sorted(set(shapes[0]) ^ set(shapes[1]))
    found = []
    for name, shape in shapes[0].items():
        piece = Piece(name, (0,) * len(shape), shape, shape, torch.float32)
        ours, theirs = (reader.read(piece) for reader in readers)
        if not torch.equal(ours, theirs):
            found.append(name)
    return found
