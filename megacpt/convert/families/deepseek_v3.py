"""DeepSeek-V3 and R1: latent attention, shared experts, and a bias on the choice of experts within groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megacpt.convert.families.decoder import (
    ATTENTION_OUTPUT,
    INPUT_NORM,
    MLP,
    MLP_NORM,
    experts,
    has_shared,
    hidden,
    stacked,
)
from megacpt.convert.families.llama import LLAMA
from megacpt.convert.families.qwen3_moe import NAMES
from megacpt.convert.families.rows import ALL, GATE, UP
from megacpt.convert.families.settings import Settings, common_keys
from megacpt.convert.families.table import Entry

if TYPE_CHECKING:
    from megacpt.config import LatentConfig, ModelConfig

_EPS = 1e-6  # of the norms on latent vectors, whatever rms_norm_eps says


def _read(settings: Settings) -> dict[str, Any]:
    settings.only("attention_bias", (False,), "latent attention has no biases here", False)
    settings.only("scoring_func", ("sigmoid",), "DeepSeek-V3 scores experts by the sigmoid of their logits", "sigmoid")
    settings.only("topk_method", ("noaux_tc",), "DeepSeek-V3 chooses experts under a bias, in groups", "noaux_tc")
    settings.only("moe_layer_freq", (1,), "behind the first dense layers all have experts", 1)
    settings.only("rope_interleave", (True,), "positions rotate neighbouring dims of a DeepSeek-V3", True)
    settings.only("rms_norm_eps", (_EPS,), f"the norms on latent vectors add {_EPS:g}, and here all norms add the same")
    keys = common_keys(settings)
    latent = {
        "kv_rank": settings.get("kv_lora_rank", 512),
        "q_rank": settings.get("q_lora_rank"),
        "plain_dim": settings.get("qk_nope_head_dim", 128),
        "rope_dim": settings.get("qk_rope_head_dim", 64),
        "value_dim": settings.get("v_head_dim", 128),
    }
    for key in ("head_dim", "qk_head_dim"):  # they follow from the others
        settings.get(key)
    keys["rope"] = {**keys["rope"], "share": 1.0}
    without = {key: value for key, value in keys.items() if key not in ("kv_heads", "head_dim")}
    return {**without, "latent": latent, "moe": _experts(settings)}


def _experts(settings: Settings) -> dict[str, Any]:
    width, shared = settings.get("moe_intermediate_size", 2048), settings.get("n_shared_experts", 0)
    top_k, groups, kept = (
        settings.get(key, default) for key, default in (("num_experts_per_tok", 8), ("n_group", 1), ("topk_group", 1))
    )
    if groups > 1 and top_k != 2 * kept:
        why = "a group counts as much as its best two experts; here as its best num_experts_per_tok / topk_group"
        settings.refuse("topk_group", f"{kept} of {groups} with num_experts_per_tok {top_k}", why)
    if layers := settings.get("num_nextn_predict_layers", 0):
        settings.notes.append(f"num_nextn_predict_layers: {layers}: layers that predict further tokens are left out")
    return {
        "experts": settings.get("n_routed_experts", 256),
        "top_k": top_k,
        "ffn": width,
        "shared_ffn": width * shared,
        "first_dense": settings.get("first_k_dense_replace", 0),
        "score": "sigmoid",
        "renormalise": bool(settings.get("norm_topk_prob", True)),
        "scale": settings.get("routed_scaling_factor", 1.0),
        "groups": groups,
        "groups_kept": kept,
        "balance": {
            "kind": "bias",
            **({"sequence_strength": settings.get("aux_loss_alpha")} if settings.get("aux_loss_alpha") else {}),
        },
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    latent, moe = _latent(model), model.moe
    assert moe is not None
    return {
        "attention_bias": False,
        "head_dim": latent.rope_dim,
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.q_rank,
        "qk_nope_head_dim": latent.plain_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "rope_interleave": True,
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": model.expert_ffn,
        "n_shared_experts": moe.shared_ffn // model.expert_ffn,
        "first_k_dense_replace": moe.first_dense,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": moe.renormalise,
        "routed_scaling_factor": moe.scale,
        "n_group": moe.groups,
        "topk_group": moe.groups_kept,
        "num_nextn_predict_layers": 0,
    }


def _refused(model: ModelConfig) -> Iterator[str]:
    moe = model.moe
    if model.norm_eps != _EPS:
        yield f"model.norm_eps: {model.norm_eps:g}, and the norms on latent vectors of a DeepSeek-V3 add {_EPS:g}"
    if moe is None:
        return
    if moe.score != "sigmoid":
        yield f"model.moe.score: {moe.score}, and a DeepSeek-V3 has sigmoid"
    if moe.every != 1:
        yield f"model.moe.every: {moe.every}, and behind the first dense layers of a DeepSeek-V3 all have experts"
    if moe.shared_ffn % model.expert_ffn:
        yield f"model.moe.shared_ffn: {moe.shared_ffn} is no multiple of the width of an expert, {model.expert_ffn}"
    if moe.groups > 1 and moe.top_k != 2 * moe.groups_kept:
        yield "model.moe.groups_kept: in a DeepSeek-V3 a group counts as much as its best two experts"


def _ignored(model: ModelConfig) -> Mapping[str, str]:
    beyond = "|".join(str(layer) for layer in range(model.layers, model.layers + 4))
    return {
        rf"model\.layers\.({beyond})\..*": "a layer that predicts further tokens",
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "frequencies, which follow from config.json",
    }


def _latent(model: ModelConfig) -> LatentConfig:
    assert model.latent is not None
    return model.latent


def _query_rank(model: ModelConfig) -> int:
    return _latent(model).q_rank or 0


def _kv_rank(model: ModelConfig) -> int:
    return _latent(model).kv_rank


def _queries(model: ModelConfig) -> int:
    return model.heads * (_latent(model).plain_dim + _latent(model).rope_dim)


def _narrow(model: ModelConfig, _: bool) -> bool:
    return _query_rank(model) > 0


_ATTENTION = (
    Entry(
        "self_attention.linear_q_proj",
        (("self_attn.q_proj", ALL),),
        _queries,
        "attention",
        columns=hidden,
        present=lambda model, _: not _query_rank(model),
    ),
    Entry(
        "self_attention.linear_q_down_proj",
        (("self_attn.q_a_proj", ALL),),
        _query_rank,
        "attention",
        columns=hidden,
        present=_narrow,
    ),
    Entry("self_attention.q_layernorm", (("self_attn.q_a_layernorm", ALL),), _query_rank, present=_narrow),
    Entry(
        "self_attention.linear_q_up_proj",
        (("self_attn.q_b_proj", ALL),),
        _queries,
        "attention",
        columns=_query_rank,
        present=_narrow,
    ),
    Entry(
        "self_attention.linear_kv_down_proj",
        (("self_attn.kv_a_proj_with_mqa", ALL),),
        lambda model: _kv_rank(model) + _latent(model).rope_dim,
        "attention",
        columns=hidden,
    ),
    Entry("self_attention.kv_layernorm", (("self_attn.kv_a_layernorm", ALL),), _kv_rank),
    Entry(
        "self_attention.linear_kv_up_proj",
        (("self_attn.kv_b_proj", ALL),),
        lambda model: model.heads * (_latent(model).plain_dim + _latent(model).value_dim),
        "attention",
        columns=_kv_rank,
    ),
    replace(ATTENTION_OUTPUT, columns=lambda model: model.heads * _latent(model).value_dim),
)


def _shared_ffn(model: ModelConfig) -> int:
    return 0 if model.moe is None else model.moe.shared_ffn


_SHARED = (
    Entry(
        "mlp.shared_experts.linear_fc1",
        (("mlp.shared_experts.gate_proj", GATE), ("mlp.shared_experts.up_proj", UP)),
        lambda model: 2 * _shared_ffn(model),
        "mlp",
        columns=hidden,
        present=has_shared,
    ),
    Entry(
        "mlp.shared_experts.linear_fc2",
        (("mlp.shared_experts.down_proj", ALL),),
        hidden,
        "mlp",
        split_dim=1,
        columns=_shared_ffn,
        present=has_shared,
    ),
)

DEEPSEEK_V3 = replace(
    LLAMA,
    name="deepseek_v3",
    title="a DeepSeek-V3",
    architecture="DeepseekV3ForCausalLM",
    entries=(
        INPUT_NORM,
        *_ATTENTION,
        MLP_NORM,
        *MLP,
        *experts(*NAMES, "mlp.gate", "mlp.gate.e_score_correction_bias"),
        *_SHARED,
    ),
    read=_read,
    write=_write,
    features={
        "activation": ("swiglu", "geglu"),
        "latent": (True,),
        "moe": (True,),
        "moe.balance": ("bias",),
    },
    refused=_refused,
    stacked=stacked(*NAMES),
    ignored=_ignored,
)
