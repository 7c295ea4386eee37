"""What a rank runs: small random models of public families, in transformers and here, with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megacpt.config import ModelConfig
from tests.model.cases import _engine, _rows
from tests.model.families import FAMILIES, MODEL, SIZES, VOCAB

Weights = dict[str, Tensor]


def beside_transformers(family: str) -> dict[str, tuple[Any, Any]]:
    """Logits [b, s, V] here and in transformers, of the same random weights; parameters and their count."""
    made, theirs = _pair(family)
    rows = torch.from_numpy(_rows()[:, :-1])
    with torch.no_grad():
        ours = made.chunks[0](rows, None, None, runtime_gather_output=True)
        expected = theirs(rows).logits
    model = made.config.model
    return {
        "logits": (ours.numpy(), expected.numpy()),
        "parameters": (sum(p.numel() for p in made.chunks[0].parameters()), model.parameters()),
    }


def _pair(family: str) -> tuple[Any, Any]:
    """The same model here, as an engine, and in transformers."""
    import transformers

    name, their_changes, our_changes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **their_changes})
    torch.manual_seed(4)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in theirs.state_dict().items():
            noise = torch.randn(tensor.shape, generator=draw) * 0.15
            tensor.copy_(1 + noise if "norm" in key and key.endswith("weight") else noise)
    made = _engine({**MODEL, **our_changes, "vocab_size": VOCAB})
    made.chunks[0].eval()
    weights = WEIGHTS[name](dict(theirs.state_dict()), made.config.model)
    mine = {key: value for key, value in made.chunks[0].state_dict().items() if key in weights or "_extra" not in key}
    assert {key for key in mine if not key.endswith(("shares", "log_u"))} == set(weights)
    with torch.no_grad():
        for key, tensor in mine.items():
            if key in weights:
                tensor.copy_(weights[key])
    return made, theirs


def _fused(model: ModelConfig, parts: list[Tensor]) -> Tensor:
    """Rows of queries, keys and values, head group after head group, as Megatron has them."""
    split = [part.view(model.kv_heads, -1, *part.shape[1:]) for part in parts]
    return torch.cat(split, 1).flatten(0, 1)


def _outside(theirs: Weights) -> Weights:
    return {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
        "output_layer.weight": theirs["lm_head.weight"],
    }


def _llama_like(theirs: Weights, model: ModelConfig) -> Weights:
    """Llama and what is like it: norms before or behind, sub-norms, biases."""
    names = {"self_attn.o_proj.weight": "self_attention.linear_proj.weight"}
    names |= {f"self_attn.{part}_norm.weight": f"self_attention.{part}_layernorm.weight" for part in "qk"}
    names["self_attn.attn_sub_norm.weight"] = "self_attention.linear_proj.sub_norm.weight"
    names["mlp.ffn_sub_norm.weight"] = "mlp.linear_fc2.sub_norm.weight"
    names["mlp.down_proj.weight"] = "mlp.linear_fc2.weight"
    if model.norm_place == "input":
        names["input_layernorm.weight"] = "input_layernorm.weight"
        names["post_attention_layernorm.weight"] = "pre_mlp_layernorm.weight"
    else:
        names["post_attention_layernorm.weight"] = "post_attention_layernorm.weight"
        names["post_feedforward_layernorm.weight"] = "post_mlp_layernorm.weight"
    found = _outside(theirs)
    for layer in range(model.layers):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        found |= {here + ours: theirs[there + name] for name, ours in names.items() if there + name in theirs}
        for kind in ("weight", "bias"):
            parts = [theirs.get(f"{there}self_attn.{part}_proj.{kind}") for part in "qkv"]
            if parts[0] is not None:
                found[f"{here}self_attention.linear_qkv.{kind}"] = _fused(model, parts)  # type: ignore[arg-type]
        found[f"{here}mlp.linear_fc1.weight"] = _gated(theirs, f"{there}mlp.")
    return found


def _gated(theirs: Weights, prefix: str) -> Tensor:
    return torch.cat([theirs[f"{prefix}gate_proj.weight"], theirs[f"{prefix}up_proj.weight"]])


def _neox(theirs: Weights, model: ModelConfig) -> Weights:
    names = {
        "attention.query_key_value": "self_attention.linear_qkv",  # each head's query, key and value, as here
        "attention.dense": "self_attention.linear_proj",
        "mlp.dense_h_to_4h": "mlp.linear_fc1",
        "mlp.dense_4h_to_h": "mlp.linear_fc2",
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "pre_mlp_layernorm",
    }
    found = {
        "embedding.word_embeddings.weight": theirs["gpt_neox.embed_in.weight"],
        "output_layer.weight": theirs["embed_out.weight" if "embed_out.weight" in theirs else "lm_head.weight"],
    }
    for kind in ("weight", "bias"):
        found[f"decoder.final_layernorm.{kind}"] = theirs[f"gpt_neox.final_layer_norm.{kind}"]
        for layer in range(model.layers):
            for name, ours in names.items():
                found[f"decoder.layers.{layer}.{ours}.{kind}"] = theirs[f"gpt_neox.layers.{layer}.{name}.{kind}"]
    return found


def _deepseek(theirs: Weights, model: ModelConfig) -> Weights:
    names = {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "pre_mlp_layernorm",
        "self_attn.q_proj": "self_attention.linear_q_proj",
        "self_attn.q_a_proj": "self_attention.linear_q_down_proj",
        "self_attn.q_a_layernorm": "self_attention.q_layernorm",
        "self_attn.q_b_proj": "self_attention.linear_q_up_proj",
        "self_attn.kv_a_proj_with_mqa": "self_attention.linear_kv_down_proj",
        "self_attn.kv_a_layernorm": "self_attention.kv_layernorm",
        "self_attn.kv_b_proj": "self_attention.linear_kv_up_proj",
        "self_attn.o_proj": "self_attention.linear_proj",
        "mlp.down_proj": "mlp.linear_fc2",
        "mlp.gate": "mlp.router",
        "mlp.shared_experts.down_proj": "mlp.shared_experts.linear_fc2",
    }
    found = _outside(theirs)
    for layer, experts in enumerate(model.moe_layers):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for name, ours in names.items():
            if f"{there}{name}.weight" in theirs:
                found[f"{here}{ours}.weight"] = theirs[f"{there}{name}.weight"]
        if experts:
            found[f"{here}mlp.router.choice_bias"] = theirs[f"{there}mlp.gate.e_score_correction_bias"]
            found[f"{here}mlp.shared_experts.linear_fc1.weight"] = _gated(theirs, f"{there}mlp.shared_experts.")
            found[f"{here}mlp.experts.linear_fc1.weight"] = theirs[f"{there}mlp.experts.gate_up_proj"]
            found[f"{here}mlp.experts.linear_fc2.weight"] = theirs[f"{there}mlp.experts.down_proj"]
        else:
            found[f"{here}mlp.linear_fc1.weight"] = _gated(theirs, f"{there}mlp.")
    return found


WEIGHTS: dict[str, Callable[[Weights, ModelConfig], Weights]] = {
    "GPTNeoX": _neox,
    "DeepseekV3": _deepseek,
    **dict.fromkeys(("Olmo2", "BitNet", "Mistral", "Qwen2", "Qwen3"), _llama_like),
}
