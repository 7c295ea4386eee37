"""Small random models of every family, made and saved by transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCAB = 288
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# The longest wavelength of a head of 8 dims is 2 pi 8^(6/8) = 30 tokens.
_ROPE = {"rope_type": "default", "rope_theta": 8.0}
_GROUPED = {"num_key_value_heads": 2, "rope_parameters": _ROPE}
_YARN = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 32}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "norm_topk_prob": True}
_LATENT = {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 4}
_DEEPSEEK: dict[str, Any] = {
    **_LATENT,
    **_EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "rope_parameters": _ROPE,
}

# By a name: the class of the configuration, and what it says beyond the sizes. The first ten are the families.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": 12}),
    "qwen2": ("Qwen2Config", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "gpt_neox": ("GPTNeoXConfig", {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}}),
    "mixtral": ("MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_GROUPED, **_EXPERTS, "num_experts": 4, "head_dim": 8}),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK),
    "bitnet": ("BitNetConfig", _GROUPED),
    # Further forms of them.
    "llama3": (
        "LlamaConfig",
        {
            "num_key_value_heads": 1,
            "head_dim": 12,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama-plain": ("LlamaConfig", {"num_key_value_heads": 4, "rope_parameters": _ROPE}),
    "llama-linear": (
        "LlamaConfig",
        {**_GROUPED, "rope_parameters": {"rope_type": "linear", "rope_theta": 8.0, "factor": 2.0}},
    ),
    "qwen2-yarn": ("Qwen2Config", {**_GROUPED, "rope_parameters": _YARN}),
    "gpt_neox-serial": ("GPTNeoXConfig", {"rope_parameters": _ROPE, "use_parallel_residual": False}),
    "qwen3_moe-some": (
        "Qwen3MoeConfig",
        {
            **_GROUPED,
            **_EXPERTS,
            "num_experts": 4,
            "head_dim": 8,
            "norm_topk_prob": False,
            "num_hidden_layers": 4,
            "mlp_only_layers": [0, 2],
        },
    ),
    "deepseek_v3-plain": (
        "DeepseekV3Config",
        {
            **_DEEPSEEK,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1},
        },
    ),
}
FAMILIES = tuple(MODELS)[:10]
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Make a model, the same for the same name, and save it; norms and biases are no ones and zeros."""
    import transformers

    kind, keys = MODELS[name]
    config = getattr(transformers, kind)(**copy.deepcopy({**_SIZES, **keys}))  # it changes what it is given
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for word, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 1 and "inv_freq" not in word:
                tensor.copy_(torch.randn(tensor.shape) * 0.2 + ("norm" in word and word.endswith("weight")))
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def loaded(folder: Path) -> Any:
    """A saved model, in float32, ready to run."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any, prompt: list[int]) -> np.ndarray:
    """Logits after each token, [tokens, V]."""
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([prompt])).logits[0].numpy()
    return found


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens behind a prompt."""
    with torch.no_grad():
        found = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return [int(token) for token in found[0, len(prompt) :]]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


Edit = Callable[[dict[str, torch.Tensor]], object]


def edit(folder: Path, change: Edit) -> None:
    """Change the tensors of a folder of one file."""
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    found = tensors(folder)
    change(found)
    save_file(found, path, metadata={"format": "pt"})
