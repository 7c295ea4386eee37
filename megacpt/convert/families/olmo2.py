"""OLMo 2: norms behind attention and MLP, and on the queries and keys of all heads together."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megacpt.convert.families.decoder import ATTENTION_OUTPUT, MLP, QUERY_KEY_VALUE, norm
from megacpt.convert.families.features import unequal_heads
from megacpt.convert.families.llama import LLAMA
from megacpt.convert.families.rows import ALL
from megacpt.convert.families.settings import Settings, common_keys
from megacpt.convert.families.table import Entry

if TYPE_CHECKING:
    from megacpt.config import ModelConfig


def _read(settings: Settings) -> dict[str, Any]:
    settings.only("attention_bias", (False,), "a model with norms on queries and keys has no biases here", False)
    settings.only("clip_qkv", (None,), "queries, keys and values are not clipped here")
    return {**common_keys(settings), "norm_place": "output", "qk_norm": "all_heads"}


def _write(_: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": False}


OLMO2 = replace(
    LLAMA,
    name="olmo2",
    title="an OLMo 2",
    architecture="Olmo2ForCausalLM",
    entries=(
        QUERY_KEY_VALUE,
        Entry(
            "self_attention.q_layernorm",
            (("self_attn.q_norm", ALL),),
            lambda model: model.heads * model.head_dim,
        ),
        Entry(
            "self_attention.k_layernorm",
            (("self_attn.k_norm", ALL),),
            lambda model: model.kv_heads * model.head_dim,
        ),
        ATTENTION_OUTPUT,
        norm("post_attention_layernorm", "post_attention_layernorm"),
        *MLP,
        norm("post_mlp_layernorm", "post_feedforward_layernorm"),
    ),
    read=_read,
    write=_write,
    features={"activation": ("swiglu", "geglu"), "norm_place": ("output",), "qk_norm": ("all_heads",)},
    refused=lambda model: unequal_heads(model, "an OLMo 2"),
)
