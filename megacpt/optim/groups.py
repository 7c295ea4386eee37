"""Parameter groups: which parameters have factors of their own on learning rate and weight decay."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import nn

from megacpt.config.multipliers import Multiplier, Multipliers, NormMultiplier


def part_of(name: str, tied: bool) -> str | None:
    """The part of the model that a parameter belongs to, or None.

    Args:
        name: Megatron's name for it.
        tied: whether the output matrix is the embedding.
    """
    if "norm" in name:
        return "norms"
    if name.startswith("embedding."):
        return "embeddings"
    if name.startswith("output_layer."):
        return "embeddings" if tied else "output"
    if ".self_attention." in name:
        return "attention"
    for part in ("router", "experts"):
        if f".mlp.{part}." in name:
            return part
    return "mlp" if ".mlp." in name else None


def multipliers_of(
    name: str, layer: int | None, dims: int, multipliers: Multipliers, tied: bool
) -> tuple[float, float]:
    """Factors on learning rate and weight decay of a parameter.

    Args:
        name: Megatron's name for it.
        layer: transformer layer of the whole model, from 1; None outside the layers.
        dims: number of its dimensions; vectors (norms, biases) have no weight decay.
        multipliers: the factors by part.
        tied: whether the output matrix is the embedding.
    """
    part = part_of(name, tied)
    parts: list[NormMultiplier] = [] if part is None else [getattr(multipliers, part)]
    lower = multipliers.lower_layers
    if layer is not None and layer <= lower.layers:
        parts.append(lower)
    rate, decay = 1.0, 0.0 if dims == 1 or name.endswith(".bias") else 1.0
    for factors in parts:
        rate *= factors.lr
        if isinstance(factors, Multiplier):
            decay *= factors.weight_decay
    return rate, decay


def group_overrides(
    chunks: Sequence[nn.Module], multipliers: Multipliers, tied: bool
) -> dict[ParamKey, ParamGroupOverride]:
    """Megatron's parameter groups by factors: ``lr_mult`` and ``wd_mult`` of each.

    The groups follow from a parameter's place in the whole model, so that they are the same under every layout.

    Args:
        chunks: this rank's model chunks.
        multipliers: the factors by part.
        tied: whether the output matrix is the embedding.
    """
    members: dict[tuple[float, float], set[int]] = {}
    for name, layer, parameter in placed(chunks):
        factors = multipliers_of(name, layer, parameter.dim(), multipliers, tied)
        members.setdefault(factors, set()).add(id(parameter))
    found: dict[ParamKey, ParamGroupOverride] = {}
    for (rate, decay), inside in members.items():
        # Megatron puts the group without overrides first, and the order decides in which the norm is summed.
        override = ParamGroupOverride()
        if rate != 1:
            override["lr_mult"] = rate
        if decay != 1:
            override["wd_mult"] = decay
        if override:
            found[_key(f"lr {rate!r} wd {decay!r}", inside)] = override
    return found


def _key(name: str, members: set[int]) -> ParamKey:
    def inside(parameter: Any, _name: str) -> bool:
        return id(parameter) in members

    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=inside))


def placed(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, int | None, nn.Parameter]]:
    """Every parameter with its name and its layer in the whole model (names count the layers of the chunk)."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            match = re.match(r"decoder\.layers\.\d+", name)
            layer: Any = None if match is None else chunk.get_submodule(match[0]).layer_number
            yield name, layer, parameter
