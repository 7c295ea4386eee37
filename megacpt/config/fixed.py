"""What a stage may change of the model that it continues, and why not the rest."""

from __future__ import annotations

from collections.abc import Iterator

from megacpt.config.base import Problem
from megacpt.config.model import ModelConfig
from megacpt.config.upcycle import Upcycle, upcycle_problems

_SHAPES = "it decides how many weights there are, and their shapes"
_NUMBERS = "it decides what the trained weights compute"
REASONS = {
    "layers": _SHAPES,
    "hidden": _SHAPES,
    "ffn": _SHAPES,
    "heads": _SHAPES,
    "kv_heads": _SHAPES,
    "head_dim": _SHAPES,
    "vocab_size": _SHAPES,
    "vocab_multiple": _SHAPES,
    "latent": _SHAPES,
    "qk_norm": _SHAPES,
    "norm": _SHAPES,
    "sub_norm": _SHAPES,
    "norm_place": _NUMBERS,
    "parallel_residual": _NUMBERS,
    "tied_embeddings": _SHAPES,
    "qkv_bias": _SHAPES,
    "bias": _SHAPES,
    "activation": _NUMBERS,
    "norm_eps": _NUMBERS,
    "rope.share": "it decides which dimensions of a head carry positions",
    "moe.experts": _SHAPES,
    "moe.ffn": _SHAPES,
    "moe.shared_ffn": _SHAPES,
    "moe.every": _SHAPES,
    "moe.first_dense": _SHAPES,
    "moe.top_k": _NUMBERS,
    "moe.score": _NUMBERS,
    "moe.renormalise": _NUMBERS,
    "moe.scale": _NUMBERS,
    "moe.groups": _NUMBERS,
    "moe.groups_kept": _NUMBERS,
}
"""Keys of the model that are fixed for a lineage. Others may change with a stage: the label, the longest sequence, base
and scaling of the rotary positions and the window (which have no weights), what keeps experts in balance, how matrices
are quantised (latent weights stay what they are), and `init_std`, which is for new weights alone."""


def model_problems(before: ModelConfig, after: ModelConfig, upcycle: Upcycle | None = None) -> Iterator[Problem]:
    """Yield what a stage changes of its model and may not, each with the reason.

    Args:
        before: model of the checkpoint.
        after: model of the stage.
        upcycle: `stage.carry.upcycle` of the stage.
    """
    yield from upcycle_problems(before, after, upcycle)
    both_have_experts = before.moe is not None and after.moe is not None
    for key, reason in REASONS.items():
        old, new = _value(before, key), _value(after, key)
        if old != new and (both_have_experts or not key.startswith("moe.")):
            text = f"{new}: a stage cannot change this, the weights were trained with {old}: {reason}; remove the key"
            yield Problem(f"model.{key}", text)


def _value(model: ModelConfig, key: str) -> object:
    value: object = model
    for part in key.split("."):
        value = None if value is None else getattr(value, part)
    return value
