"""Parts of the model that a stage leaves as they are, to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from megacpt.config.carry import layer_range
from megacpt.optim.groups import part_of, placed

Frozen = dict[int, Literal["part", "layer"]]
"""Parameters that are not trained, by identity: because of what they are, or because of the layer that they are in."""


def freeze(chunks: Sequence[nn.Module], parts: Sequence[str], tied: bool) -> Frozen:
    """Take parts of the model out of training: they get no gradient, no weight decay and no optimizer state.

    Args:
        chunks: this rank's model chunks, not yet wrapped.
        parts: names of parts, and ranges of layers as ``layers:1-4``.
        tied: whether the output matrix is the embedding.
    """
    ranges = [layer_range(part) for part in parts]
    frozen: Frozen = {}
    for name, layer, parameter in placed(chunks):
        if part_of(name, tied) in parts:
            frozen[id(parameter)] = "part"
        elif layer is not None and any(first <= layer <= last for first, last in ranges):
            frozen[id(parameter)] = "layer"
        else:
            continue
        parameter.requires_grad_(False)
    return frozen
