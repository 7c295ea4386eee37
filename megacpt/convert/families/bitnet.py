"""BitNet b1.58: a gate of squared ReLU, and norms on what the last projections multiply."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megacpt.convert.families.decoder import ATTENTION_OUTPUT, INPUT_NORM, MLP, MLP_NORM, QUERY_KEY_VALUE
from megacpt.convert.families.features import unequal_heads
from megacpt.convert.families.llama import LLAMA
from megacpt.convert.families.rows import ALL
from megacpt.convert.families.settings import Settings, common_keys
from megacpt.convert.families.table import Entry

if TYPE_CHECKING:
    from megacpt.config import ModelConfig


def _read(settings: Settings) -> dict[str, Any]:
    settings.only("attention_bias", (False,), "biases are on all linear layers of the blocks here, or on none", False)
    return {**common_keys(settings, base=500000.0, act="relu2", default_eps=1e-5), "sub_norm": True}


def _write(_: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": False}


BITNET = replace(
    LLAMA,
    name="bitnet",
    title="a BitNet",
    architecture="BitNetForCausalLM",
    entries=(
        INPUT_NORM,
        QUERY_KEY_VALUE,
        Entry(
            "self_attention.linear_proj.sub_norm",
            (("self_attn.attn_sub_norm", ALL),),
            lambda model: model.heads * model.head_dim,
        ),
        ATTENTION_OUTPUT,
        MLP_NORM,
        MLP[0],
        Entry("mlp.linear_fc2.sub_norm", (("mlp.ffn_sub_norm", ALL),), lambda model: model.ffn),
        MLP[1],
    ),
    read=_read,
    write=_write,
    features={"activation": ("swiglu", "geglu", "relu2glu"), "sub_norm": (True,)},
    refused=lambda model: unequal_heads(model, "a BitNet"),
)
