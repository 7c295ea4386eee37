"""Small models of public families: the settings of transformers, and ours."""

from __future__ import annotations

from typing import Any

VOCAB, LONGEST = 320, 192
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": LONGEST,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "attn_implementation": "eager",
}
MODEL: dict[str, Any] = {
    "layers": 2,
    "hidden": 32,
    "ffn": 48,
    "heads": 4,
    "kv_heads": 2,
    "vocab_multiple": 64,
    "max_seq_length": LONGEST,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 24}
OUR_YARN = {"kind": "yarn", "factor": 4.0, "original_length": 24}
LATENT = {"kv_rank": 20, "q_rank": 12, "plain_dim": 8, "rope_dim": 4, "value_dim": 6}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,  # what the norms of latent vectors have, whatever is given
    "kv_lora_rank": 20,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
OUR_DEEPSEEK: dict[str, Any] = {
    "kv_heads": None,
    "norm_eps": 1e-6,
    "latent": LATENT,
    "moe": {
        "experts": 8,
        "top_k": 4,
        "ffn": 24,
        "shared_ffn": 48,
        "first_dense": 1,
        "score": "sigmoid",
        "renormalise": True,
        "scale": 2.5,
        "groups": 4,
        "groups_kept": 2,
        "balance": {"kind": "bias"},
    },
}

FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpt-neox": (
        "GPTNeoX",
        {"rotary_pct": 0.5, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "use_parallel_residual": True},
        {
            "kv_heads": 4,
            "activation": "gelu",
            "bias": True,
            "norm": "layernorm",
            "parallel_residual": True,
            "rope": {"share": 0.5},
        },
    ),
    "gpt-neox, one after the other": (
        "GPTNeoX",
        {"rotary_pct": 0.5, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "use_parallel_residual": False},
        {"kv_heads": 4, "activation": "gelu", "bias": True, "norm": "layernorm", "rope": {"share": 0.5}},
    ),
    "olmo 2": ("Olmo2", {}, {"qk_norm": "all_heads", "norm_place": "output"}),
    "bitnet": (
        "BitNet",
        {"hidden_act": "relu2", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"activation": "relu2glu", "sub_norm": True},
    ),
    "mistral": ("Mistral", {"sliding_window": 7}, {"window": 7}),
    "qwen 2 with yarn": ("Qwen2", {"rope_parameters": YARN}, {"qkv_bias": True, "rope": {"base": 100.0}}),
    "qwen 3 with yarn": (
        "Qwen3",
        {"rope_parameters": {**YARN, "beta_fast": 4.0, "beta_slow": 2.0}, "head_dim": 12},
        {"qk_norm": True, "head_dim": 12, "rope": {"base": 100.0}},
    ),
    "deepseek-v3": ("DeepseekV3", DEEPSEEK, OUR_DEEPSEEK),
    "deepseek-v2, dense": (
        "DeepseekV3",
        {**DEEPSEEK, "q_lora_rank": None, "first_k_dense_replace": 2, "rope_parameters": YARN},
        {"kv_heads": None, "norm_eps": 1e-6, "latent": {**LATENT, "q_rank": None}, "rope": {"base": 100.0}},
    ),
}
FAMILIES["qwen 2 with yarn"][2]["rope"]["scaling"] = OUR_YARN
FAMILIES["qwen 3 with yarn"][2]["rope"]["scaling"] = {**OUR_YARN, "beta_fast": 4.0, "beta_slow": 2.0}
SHARP = {"mscale": 0.7, "mscale_all_dim": 1.3}
FAMILIES["deepseek-v2, dense"][1]["rope_parameters"] = {**YARN, **SHARP}
FAMILIES["deepseek-v2, dense"][2]["rope"]["scaling"] = {**OUR_YARN, **SHARP}
