"""Megatron's own GPT model, under the names that checkpoints have here: nothing is cut or fused differently.

Where Megatron's files have other names, `megatron_names` translates them before they come to this table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megacpt.convert.families.decoder import (
    all_biases,
    dense,
    even_share,
    experts_of,
    has_shared,
    head_norm,
    hidden,
    norm,
    qk_norm,
    qkv_biases,
    with_experts,
)
from megacpt.convert.families.features import ANY
from megacpt.convert.families.llama import LLAMA
from megacpt.convert.families.rows import ALL
from megacpt.convert.families.table import Entry, Kind, Size

if TYPE_CHECKING:
    from collections.abc import Callable

    from megacpt.config import ModelConfig

_ROUTER = "mlp.router.choice_bias"


def _norm_biases(model: ModelConfig) -> bool:
    return model.norm == "layernorm"


def _gates(model: ModelConfig) -> int:
    return 2 if model.gated else 1


def _shared(model: ModelConfig) -> int:
    return 0 if model.moe is None else model.moe.shared_ffn


def _learns_choice(model: ModelConfig, moe: bool) -> bool:
    return moe and model.moe is not None and model.moe.balance.kind == "bias"


def _has_no_choice(model: ModelConfig, moe: bool) -> bool:
    return moe and not _learns_choice(model, moe)


def _feed_forward(
    name: str, width: Size, present: Callable[[ModelConfig, bool], bool], kind: Kind, experts: bool = False
) -> tuple[Entry, Entry]:
    """The two matrices of an MLP of a width, or of all experts of a layer."""
    theirs = ".{}" if experts else ""
    first, second = f"{name}.linear_fc1", f"{name}.linear_fc2"
    return (
        Entry(
            first,
            ((first + theirs, ALL),),
            lambda model: _gates(model) * width(model),
            kind,
            columns=hidden,
            biased=all_biases,
            present=present,
            experts=experts,
        ),
        Entry(
            second,
            ((second + theirs, ALL),),
            hidden,
            kind,
            split_dim=1,
            columns=width,
            biased=all_biases,
            present=present,
            experts=experts,
        ),
    )


MEGATRON = replace(
    LLAMA,
    name="megatron",
    title="Megatron's GPT model",
    architecture="GPTModel",
    layer="decoder.layers.{}",
    embedding="embedding.word_embeddings",
    norm="decoder.final_layernorm",
    head="output_layer",
    entries=(
        norm("input_layernorm", "input_layernorm", _norm_biases),
        Entry(
            "self_attention.linear_qkv",
            (("self_attention.linear_qkv", ALL),),
            lambda model: (model.heads + 2 * model.kv_heads) * model.head_dim,
            "attention",
            columns=hidden,
            biased=qkv_biases,
        ),
        *(
            Entry(name, ((name, ALL),), head_norm, present=qk_norm)
            for name in ("self_attention.q_layernorm", "self_attention.k_layernorm")
        ),
        Entry(
            "self_attention.linear_proj",
            (("self_attention.linear_proj", ALL),),
            hidden,
            "attention",
            split_dim=1,
            columns=lambda model: model.heads * model.head_dim,
            biased=all_biases,
        ),
        norm("pre_mlp_layernorm", "pre_mlp_layernorm", _norm_biases),
        *_feed_forward("mlp", lambda model: model.ffn, dense, "mlp"),
        Entry("mlp.router", (("mlp.router", ALL),), experts_of, columns=hidden, present=with_experts),
        Entry(_ROUTER, ((_ROUTER, ALL),), experts_of, present=_learns_choice, bare=True, exact=True),
        Entry(_ROUTER, (), experts_of, present=_has_no_choice, bare=True),
        Entry("mlp.router.log_u", (), experts_of, present=with_experts, bare=True),
        Entry("mlp.router.shares", (), experts_of, present=with_experts, bare=True, fill=even_share),
        *_feed_forward("mlp.experts", lambda model: model.expert_ffn, with_experts, "experts", experts=True),
        *_feed_forward("mlp.shared_experts", _shared, has_shared, "mlp"),
    ),
    features={
        "activation": ("swiglu", "geglu", "gelu"),
        "norm": ("rmsnorm", "layernorm"),
        "qk_norm": (False, True),
        "qkv_bias": (False, True),
        "bias": (False, True),
        "rope.share": (ANY,),
        "rope.scaling": (None, "llama3"),
        "moe": (False, True),
        "moe.balance": ("penalty", "sinkhorn", "bias", "none"),
    },
    refused=lambda _: iter(()),
)
