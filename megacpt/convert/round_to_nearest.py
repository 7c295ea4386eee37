"""QuantLM's baseline: the matrices of a float model rounded to few bits after training, in groups of a row.

Spectra (Kaushal et al. 2024, arXiv 2407.12327) compares its ternary models with float ones at 3, 4, 6 and 8 bits,
symmetric, a scale for 128 weights. Here each weight goes to the nearest level, without data to calibrate with.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megacpt.checkpoint.pieces import Piece, PieceReader
from megacpt.checkpoint.store import checkpoint_step
from megacpt.config import QuantiseConfig
from megacpt.convert.derived import check_free, publish
from megacpt.convert.families import Source
from megacpt.convert.weights import ROUNDED, ModelWeights, Progress, piece_of
from megacpt.errors import ConfigError
from megacpt.quant.matrix import quantise_matrix


def round_to_nearest(
    checkpoint: Path, out: Path, bits: int, group: int = 128, progress: Progress | None = None
) -> Path:
    """Write a float checkpoint with its matrices rounded, as a run folder that holds one checkpoint of weights alone.

    A group's largest weight becomes the largest level, 2^(bits - 1) - 1; its scale is kept in float16, so that code
    times scale is exact and `pack` finds the codes again. Embedding, head and norms stay as they are. Under torchrun
    the ranks share the work.

    Args:
        checkpoint: a checkpoint without quantised matrices, or a run folder for its newest.
        out: a new folder.
        bits: 2 to 8.
        group: weights of a row that share a scale; it divides hidden, ffn and heads * head_dim.
        progress: told after each block: how many of this rank's are written, and how many there are in all.

    Returns:
        The new checkpoint.

    Raises:
        ConfigError: the model is quantised already, the group does not fit, or `out` holds a run.
        CheckpointError: the checkpoint is damaged, or the disk fails.
    """
    weights = ModelWeights(checkpoint)
    if weights.quantise is not None:
        raise ConfigError(f"{weights.folder} has quantised matrices already, and only a float model can be rounded")
    check_free(out)
    scale = {"scope": "group", "group": group, "format": "float16"}
    grid = QuantiseConfig.model_validate({"grid": "int", "bits": bits, "scale": scale, "parts": ["attention", "mlp"]})
    rounded = {
        (source.name, source.layer): source for source in weights.sources(padded=True) if source.kind in grid.parts
    }
    _check_group(list(rounded.values()), group)
    reader = PieceReader(weights.folder)
    names = {name for name, _ in rounded}
    others = [piece for piece in reader.pieces() if piece.name not in names]
    pieces = [*others, *(piece_of(source, weights.model.layers) for source in rounded.values())]
    ledger = replace(
        weights.ledger,
        parent=weights.ledger.id,
        parent_path=str(weights.folder.resolve()),
        derived={"operation": ROUNDED, "of": [weights.ledger.id], "grid": grid.model_dump(mode="json")},
    )
    config = weights.config.model_copy(update={"run": out})

    def make(piece: Piece) -> Tensor:
        found = reader.read(piece)
        source = rounded.get((piece.name, piece.offsets[0]))
        if source is None:
            return found
        return quantise_matrix(found[0], grid, source.split_dim, source.halves).dense()[None]

    return publish(config, ledger, checkpoint_step(weights.folder), pieces, make, progress)


def _check_group(sources: list[Source], group: int) -> None:
    widths = sorted({source.shape[-1] for source in sources})
    if any(width % group for width in widths):
        common = math.gcd(*widths)
        choices = ", ".join(str(size) for size in range(8, common + 1) if common % size == 0)
        raise ConfigError(f"--group {group} does not divide the widths {', '.join(map(str, widths))}: take {choices}")
