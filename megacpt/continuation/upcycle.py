"""A dense checkpoint as the beginning of a model with experts (Komatsuzaki et al. 2022, arXiv 2212.05055).

A checkpoint of a dense model has its layers stacked, as ``decoder.layers.mlp.linear_fc2.weight`` [L, h, f]; one of a
model with experts names them one by one, ``decoder.layers.3.mlp.experts.linear_fc2.weight`` [E, h, f]. Every rank reads
the blocks that its own parameters begin as, whatever the layouts of both, and no more than that.

What was there before keeps its running means. Experts and routers begin with none: an expert that is a copy sees a part
of the tokens, weighted, so that its gradients are another size than those that the MLP's means were gathered from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from megacpt.checkpoint.pieces import Piece, PieceReader
from megacpt.checkpoint.store import verify
from megacpt.checkpoint.tensors import OPTIMIZER
from megacpt.config.upcycle import Upcycle
from megacpt.engine.protocol import Engine

MLP, EXPERTS, SHARED, ROUTER = ".mlp.", ".mlp.experts.", ".mlp.shared_experts.", ".mlp.router."
_LAYER = re.compile(r"(.*decoder\.layers\.)(\d+)\.(.+)")
_COUNT = OPTIMIZER + "count."


def load_upcycled(folder: Path, engine: Engine, layers: int, how: Upcycle) -> None:
    """Load a dense checkpoint into an engine of a model with experts; every rank calls this.

    Both compute the same: the models agree in all else, and the experts fit `how` (`config.upcycle`).

    Args:
        folder: the checkpoint.
        engine: with new weights, which routers keep.
        layers: of the models.
        how: ``copy``: every expert is a copy of the MLP. ``shared``: the shared expert is the MLP, and the second
            matrices of the others are 0.

    Raises:
        CheckpointError: if the checkpoint is damaged or holds another model.
    """
    verify(folder)
    dense = _Dense(folder, layers, how)
    values = {name: dense.value(part) for name, part in engine.state().items()}
    engine.load({name: value for name, value in values.items() if value is not None})


class _Dense:
    """Reads a dense checkpoint for the parts of a model with experts.

    Args:
        folder: the checkpoint.
        layers: of the model.
        how: as for `load_upcycled`.
    """

    def __init__(self, folder: Path, layers: int, how: Upcycle) -> None:
        self.reader = PieceReader(folder)
        self.layers = layers
        self.how = how

    def value(self, part: Any) -> Tensor | None:
        """Return what a part of the engine's state begins as; None for a running mean that begins anew."""
        if EXPERTS in part.key or ROUTER in part.key:
            if part.key.startswith(OPTIMIZER):
                return None
            return self._experts(part) if EXPERTS in part.key else part.data
        part = replace(part, key=part.key.replace(SHARED, MLP))
        if part.key.startswith(OPTIMIZER) and _stacked(part.key)[0] not in self.reader.tensors:
            return None  # frozen, or of another optimizer, or of weights alone
        return self._read(part)

    def _experts(self, part: ShardedTensor) -> Tensor:
        """[e, o, i], one matrix of the experts on this rank."""
        if self.how == "copy":
            shape = part.local_shape[1:]
            return self._block(part.key.replace(EXPERTS, MLP), (0, 0), shape, shape).expand(part.local_shape)
        new: Tensor = part.data
        return torch.zeros_like(new) if part.key.endswith("linear_fc2.weight") else new

    def _read(self, part: Any) -> Tensor:
        """Read what is stored for a part; Megatron keeps the two halves of a gated matrix apart."""
        if isinstance(part, ShardedTensorFactory):
            halves: Tensor = part.merge_fn([self._read(half) for half in part.build()])
            return halves
        return self._block(part.key, part.global_offset, part.local_shape, part.global_shape)

    def _block(self, key: str, offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Read a block of a tensor that is named as in a model with experts."""
        name, layer = _stacked(key)
        whole = tuple(offsets), tuple(sizes), tuple(shape)
        if layer is None:
            return self.reader.read(Piece(name, *whole, torch.float32))
        if name.startswith(_COUNT):  # one number a layer
            return self.reader.read(Piece(name, (layer,), (1,), (self.layers,), torch.float64))
        in_layer = (layer, *whole[0]), (1, *whole[1]), (self.layers, *whole[2])
        return self.reader.read(Piece(name, *in_layer, torch.float32))[0]


def _stacked(key: str) -> tuple[str, int | None]:
    """Return the name that a tensor of a layer has in a dense checkpoint, and the layer from 0; None for others."""
    match = _LAYER.fullmatch(key)
    return (key, None) if match is None else (match[1] + match[3], int(match[2]))
