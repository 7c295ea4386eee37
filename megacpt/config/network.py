"""Which choices of a network go together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megacpt.config.base import Problem
from megacpt.config.latent import LatentConfig
from megacpt.config.moe import MoEConfig

if TYPE_CHECKING:
    from megacpt.config.model import ModelConfig


def network_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what does not go together, whatever the layout; keys are relative to the model."""
    if model.heads % model.kv_heads:
        choices = _choices(n for n in range(1, model.heads + 1) if model.heads % n == 0)
        yield Problem("kv_heads", f"{model.kv_heads} does not divide heads, which is {model.heads}: take {choices}")
    if model.latent is not None:
        yield from _latent_problems(model, model.latent)
    elif "head_dim" not in model.model_fields_set and model.hidden % model.heads:
        choices = _choices(n for n in range(1, model.hidden + 1) if model.hidden % n == 0 and n <= 2 * model.heads)
        yield Problem(
            "heads",
            f"{model.heads} does not divide hidden, which is {model.hidden}: take {choices}, or give head_dim",
        )
    elif model.rotary_dim < 2 or model.head_dim * model.rope.share != model.rotary_dim or model.rotary_dim % 2:
        yield Problem(
            "rope.share",
            f"{model.rope.share:g} of head_dim {model.head_dim} is {model.head_dim * model.rope.share:g} "
            "rotated dimensions, not an even whole number: take another share, or an even head_dim",
        )
    if model.moe is not None:
        yield from _expert_problems(model, model.moe)
    if model.parallel_residual and model.norm_place == "output":
        text = "true: one sum of attention and MLP has no place for two norms of outputs: take norm_place: input"
        yield Problem("parallel_residual", text)


def _expert_problems(model: ModelConfig, moe: MoEConfig) -> Iterator[Problem]:
    if model.bias:
        yield Problem("bias", "true: experts have no biases, so a model with model.moe has none: take false")
    if model.sub_norm:
        text = "true: experts have no norm within, so a model with model.moe has none: take false"
        yield Problem("sub_norm", text)
    if not any(model.moe_layers):
        text = f"{moe.first_dense} leaves no layer with experts; model.layers is {model.layers}"
        yield Problem("moe.first_dense", text)


def _latent_problems(model: ModelConfig, latent: LatentConfig) -> Iterator[Problem]:
    """What latent attention has in a way of its own."""
    if model.kv_heads != model.heads:
        text = f"{model.kv_heads}: latent attention has keys and values for each head: take {model.heads}, or remove"
        yield Problem("kv_heads", f"{text} the key")
    if model.head_dim != latent.head_dim:
        text = f"{model.head_dim}: with latent it is plain_dim + rope_dim, {latent.head_dim}: remove the key"
        yield Problem("head_dim", text)
    if model.rope.share != 1:
        text = f"{model.rope.share:g}: latent.rope_dim says how many dimensions are rotated: take 1"
        yield Problem("rope.share", text)
    if model.qk_norm:
        text = f"{str(model.qk_norm).lower()}: latent attention normalises its latent vectors instead: take false"
        yield Problem("qk_norm", text)
    yield from (
        Problem(key, "true: the projections of latent attention have no biases: take false")
        for key in ("bias", "qkv_bias")
        if getattr(model, key)
    )
    if model.quantise is not None and "attention" in model.quantise.parts:
        text = f"{', '.join(model.quantise.parts)}: the matrices of latent attention are not quantised: name others"
        yield Problem("quantise.parts", text)


def _choices(values: Iterator[int]) -> str:
    found = list(values)
    return " or ".join([", ".join(map(str, found[:-1])), str(found[-1])]) if len(found) > 1 else str(found[0])
