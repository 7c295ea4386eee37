"""Mixtral: experts in every layer, of which each token uses some, with weights that sum to 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megacpt.convert.families.decoder import ATTENTION_OUTPUT, INPUT_NORM, MLP_NORM, QUERY_KEY_VALUE, experts, stacked
from megacpt.convert.families.llama import LLAMA
from megacpt.convert.families.settings import Settings, common_keys, window_key

if TYPE_CHECKING:
    from megacpt.config import ModelConfig

_NAMES = ("block_sparse_moe.experts.{}", "w1", "w3", "w2")


def _read(settings: Settings) -> dict[str, Any]:
    keys = common_keys(settings, base=1e6)
    moe = {
        "experts": settings.get("num_local_experts", 8),
        "top_k": settings.get("num_experts_per_tok", 2),
        "score": "softmax",
        "renormalise": True,
        "balance": penalty(settings),
    }
    return {**keys, "window": window_key(settings), "moe": moe}


def penalty(settings: Settings) -> dict[str, Any]:
    """Return `model.moe.balance`: the loss of a Switch layer, as strong as the model was trained with."""
    return {"kind": "penalty", "strength": settings.get("router_aux_loss_coef", 0.001)}


def written_penalty(model: ModelConfig) -> dict[str, Any]:
    """The key of the balance loss."""
    balance = None if model.moe is None else model.moe.balance
    return {"router_aux_loss_coef": getattr(balance, "strength", 0.0)}


def _write(model: ModelConfig) -> dict[str, Any]:
    assert model.moe is not None
    return {
        "intermediate_size": model.expert_ffn,
        "num_local_experts": model.moe.experts,
        "num_experts_per_tok": model.moe.top_k,
        "sliding_window": model.window,
        **written_penalty(model),
    }


def unlike_softmax(model: ModelConfig, title: str) -> Iterator[str]:
    """Yield why a network's experts are not chosen by the softmax of their logits, as they are."""
    moe = model.moe
    if moe is None:
        return
    for key, value in (("score", "softmax"), ("scale", 1.0), ("groups", 1), ("shared_ffn", 0)):
        found = getattr(moe, key)
        if found != value:
            yield f"model.moe.{key}: {found}, and {title} has {value}"


def _refused(model: ModelConfig) -> Iterator[str]:
    yield from unlike_softmax(model, "a Mixtral")
    if model.moe is not None and not model.moe.renormalise:
        yield "model.moe.renormalise: in a Mixtral the weights of a token's experts sum to 1"
    if not all(model.moe_layers):
        yield "model.moe.every, model.moe.first_dense: a Mixtral has experts in all layers"


MIXTRAL = replace(
    LLAMA,
    name="mixtral",
    title="a Mixtral",
    architecture="MixtralForCausalLM",
    entries=(
        INPUT_NORM,
        QUERY_KEY_VALUE,
        ATTENTION_OUTPUT,
        MLP_NORM,
        *experts(*_NAMES, "block_sparse_moe.gate"),
    ),
    read=_read,
    write=_write,
    features={"activation": ("swiglu", "geglu"), "window": (False, True), "moe": (True,)},
    refused=_refused,
    stacked={**stacked(*_NAMES), "mlp.gate.weight": ("block_sparse_moe.gate.weight",)},
)
