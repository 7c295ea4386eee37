"""Qwen 3 with experts: narrow ones, in all layers or some of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megacpt.convert.families.decoder import (
    ATTENTION_OUTPUT,
    HEAD_NORMS,
    INPUT_NORM,
    MLP,
    MLP_NORM,
    QUERY_KEY_VALUE,
    experts,
    stacked,
)
from megacpt.convert.families.llama import LLAMA
from megacpt.convert.families.mixtral import penalty, unlike_softmax, written_penalty
from megacpt.convert.families.qwen3 import qwen3_keys
from megacpt.convert.families.settings import Settings

if TYPE_CHECKING:
    from megacpt.config import ModelConfig

NAMES = ("mlp.experts.{}", "gate_proj", "up_proj", "down_proj")


def _read(settings: Settings) -> dict[str, Any]:
    moe = {
        "experts": settings.get("num_experts", settings.get("num_local_experts", 128)),
        "top_k": settings.get("num_experts_per_tok", 8),
        "ffn": settings.get("moe_intermediate_size", 768),
        "score": "softmax",
        "renormalise": bool(settings.get("norm_topk_prob", False)),
        "balance": penalty(settings),
        **_places(settings),
    }
    settings.get("num_local_experts")
    return {**qwen3_keys(settings, first=0), "moe": moe}


def _places(settings: Settings) -> dict[str, int]:
    """Which layers have experts, as a first one and a distance."""
    layers, step = settings.need("num_hidden_layers"), settings.get("decoder_sparse_step", 1)
    dense = settings.get("mlp_only_layers", [])
    due = [n not in dense and (n + 1) % step == 0 for n in range(layers)]
    first = due.index(True) if True in due else 0
    every = next((n for n in range(1, layers - first) if due[first + n]), layers)
    if due != [n >= first and (n - first) % every == 0 for n in range(layers)]:
        settings.refuse("mlp_only_layers", dense, "the layers with experts have no even distance from one another")
    return {"first_dense": first, "every": every}


def _write(model: ModelConfig) -> dict[str, Any]:
    assert model.moe is not None
    return {
        "attention_bias": False,
        "use_sliding_window": model.window is not None,
        "sliding_window": model.window,
        "num_experts": model.moe.experts,
        "num_experts_per_tok": model.moe.top_k,
        "moe_intermediate_size": model.expert_ffn,
        "norm_topk_prob": model.moe.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [n for n, moe in enumerate(model.moe_layers) if not moe],
        **written_penalty(model),
    }


def _refused(model: ModelConfig) -> Iterator[str]:
    yield from unlike_softmax(model, "a Qwen 3 with experts")


QWEN3_MOE = replace(
    LLAMA,
    name="qwen3_moe",
    title="a Qwen 3 with experts",
    architecture="Qwen3MoeForCausalLM",
    entries=(INPUT_NORM, QUERY_KEY_VALUE, *HEAD_NORMS, ATTENTION_OUTPUT, MLP_NORM, *MLP, *experts(*NAMES, "mlp.gate")),
    read=_read,
    write=_write,
    features={"activation": ("swiglu", "geglu"), "qk_norm": (True,), "window": (False, True), "moe": (True,)},
    refused=_refused,
    stacked=stacked(*NAMES),
)
