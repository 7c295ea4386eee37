"""How many bits a model has: tensor by tensor, scales, embedding and head included."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megacpt.checkpoint.store import find_checkpoint
from megacpt.config import ModelConfig, QuantiseConfig, load_run
from megacpt.continuation.boundary import RUN
from megacpt.continuation.ledger import Ledger
from megacpt.convert.families import LLAMA, check_names
from megacpt.convert.packed_folder import PackedFolder
from megacpt.convert.weights import grid_of, scale_shape

INFORMATION = math.log2(3)
"""Bits of a ternary weight that may be any of its three values."""


@dataclass(frozen=True)
class TensorBits:
    """Tensors of one name over all layers.

    Attributes:
        name: with ``*`` for the number of the layer.
        weights: how many numbers.
        code_bits: of these.
        scale_bits: of their scales.
    """

    name: str
    weights: int
    code_bits: float
    scale_bits: float

    @property
    def bits(self) -> float:
        """Of codes and scales."""
        return self.code_bits + self.scale_bits


def bits_of_model(
    model: ModelConfig,
    vocab: int | None = None,
    quantise: QuantiseConfig | None = None,
    plain: float = 16.0,
    ternary: float = INFORMATION,
) -> list[TensorBits]:
    """Count the bits of a network, whatever its weights.

    Args:
        model: the network.
        vocab: of the tokenizer, where the model does not say it.
        quantise: the grid; None for that of the model.
        plain: bits of a weight that is not quantised.
        ternary: bits of a ternary weight.

    Raises:
        ConfigError: the network has experts, or an MLP without a gate.
    """
    check_names(model)
    grid = quantise or model.quantise
    rows = model.padded_vocab(vocab)
    found = []
    for source in LLAMA.sources(model, rows, rows):
        for target in source.targets:
            weights = torch.Size(target.shape).numel()
            if grid is None or source.kind not in grid.parts:
                found.append(TensorBits(target.name, weights, weights * plain, 0.0))
                continue
            scales = math.prod(scale_shape(target, source, grid)) * _scale_width(grid)
            # One matrix of ours that is several here has its scales once, and they are told of the first.
            shared = grid.scale.group is None and target is not source.targets[0]
            found.append(TensorBits(target.name, weights, weights * _width(grid, ternary), 0.0 if shared else scales))
    return _by_name(found)


def bits_of_folder(folder: PackedFolder) -> list[TensorBits]:
    """Count the bits that a packed folder stores."""
    stored = folder.stored_bytes().items()
    return _by_name(TensorBits(name, count, 8.0 * codes, 8.0 * scales) for name, (count, codes, scales) in stored)


def bits_of_checkpoint(path: Path, plain: float = 16.0, ternary: float = INFORMATION) -> list[TensorBits]:
    """Count the bits of the model that a checkpoint holds; arguments and errors as `bits_of_model`."""
    folder = find_checkpoint(path)
    ledger, model = Ledger.read(folder), load_run(folder / RUN).model
    return bits_of_model(model, ledger.tokenizer["vocab_size"], grid_of(model, ledger), plain, ternary)


def _width(grid: QuantiseConfig, ternary: float) -> float:
    """Bits of a code."""
    return {"ternary": ternary, "binary": 1.0}.get(grid.grid, float(grid.bits or 0))


def _scale_width(grid: QuantiseConfig) -> int:
    return 32 if grid.scale.format == "float32" else 16


def _by_name(parts: Iterable[TensorBits]) -> list[TensorBits]:
    """Add up the layers."""
    found: dict[str, TensorBits] = {}
    for part in parts:
        name = re.sub(r"\.\d+\.", ".*.", part.name)
        known = found.get(name, TensorBits(name, 0, 0.0, 0.0))
        found[name] = TensorBits(
            name,
            known.weights + part.weights,
            known.code_bits + part.code_bits,
            known.scale_bits + part.scale_bits,
        )
    return list(found.values())
