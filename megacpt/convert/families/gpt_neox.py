"""GPT-NeoX and Pythia: attention and MLP side by side, biases everywhere, a quarter of each head rotated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megacpt.convert.families.decoder import all_biases, always, hidden, norm, qkv_biases
from megacpt.convert.families.features import ANY, unequal_heads
from megacpt.convert.families.llama import LLAMA
from megacpt.convert.families.rows import ALL
from megacpt.convert.families.settings import Settings, common_keys
from megacpt.convert.families.table import Entry

if TYPE_CHECKING:
    from megacpt.config import ModelConfig


def _read(settings: Settings) -> dict[str, Any]:
    settings.only("hidden_act", ("gelu",), "an MLP without a gate has the exact GELU here", "gelu")
    settings.only("attention_bias", (True,), "a network with norms that have biases has them everywhere here", True)
    return {
        **common_keys(settings, eps="layer_norm_eps", share=0.25, default_eps=1e-5),
        "activation": "gelu",
        "norm": "layernorm",
        "bias": True,
        "parallel_residual": bool(settings.get("use_parallel_residual", True)),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm_eps,
        "rotary_pct": model.rope.share,
        "rotary_emb_base": model.rope.base,
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": True,
    }


def _refused(model: ModelConfig) -> Iterator[str]:
    yield from unequal_heads(model, "a GPT-NeoX")
    if model.kv_heads != model.heads:
        yield f"model.kv_heads: {model.kv_heads}, and each of the {model.heads} heads of a GPT-NeoX has its own"


GPT_NEOX = replace(
    LLAMA,
    name="gpt_neox",
    title="a GPT-NeoX",
    architecture="GPTNeoXForCausalLM",
    layer="gpt_neox.layers.{}",
    embedding="gpt_neox.embed_in",
    norm="gpt_neox.final_layer_norm",
    head="embed_out",
    entries=(
        norm("input_layernorm", "input_layernorm", always),
        # Each head has its query, key and value below each other, as a group of one head has here.
        Entry(
            "self_attention.linear_qkv",
            (("attention.query_key_value", ALL),),
            lambda model: 3 * model.heads * model.head_dim,
            "attention",
            columns=hidden,
            biased=qkv_biases,
        ),
        Entry(
            "self_attention.linear_proj",
            (("attention.dense", ALL),),
            hidden,
            "attention",
            split_dim=1,
            columns=lambda model: model.heads * model.head_dim,
            biased=all_biases,
        ),
        norm("pre_mlp_layernorm", "post_attention_layernorm", always),
        Entry(
            "mlp.linear_fc1",
            (("mlp.dense_h_to_4h", ALL),),
            lambda model: model.ffn,
            "mlp",
            columns=hidden,
            biased=all_biases,
        ),
        Entry(
            "mlp.linear_fc2",
            (("mlp.dense_4h_to_h", ALL),),
            hidden,
            "mlp",
            split_dim=1,
            columns=lambda model: model.ffn,
            biased=all_biases,
        ),
    ),
    read=_read,
    write=_write,
    features={
        "activation": ("gelu",),
        "norm": ("layernorm",),
        "parallel_residual": (False, True),
        "bias": (True,),
        "qkv_bias": (False, True),
        "rope.share": (ANY,),
    },
    refused=_refused,
    ignored=lambda _: {
        r"gpt_neox\.layers\.\d+\.attention\.(masked_bias|bias)": "a mask",
        r"gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq": "frequencies, which follow from config.json",
    },
)
