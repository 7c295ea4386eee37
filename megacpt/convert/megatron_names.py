"""How Megatron-LM and Megatron Core name the tensors of a GPT model, and what its arguments say of the network.

Facts of Megatron Core 0.12 to 0.16, format ``torch_dist``: layers that are all alike are stacked in a leading dim, and
others have their number in the name; the norm before a linear layer carries that layer's name, whether it is fused with
it or not; the rows of fused matrices lie as they do here.
"""

from __future__ import annotations

import itertools
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from megacpt.checkpoint.pieces import LAYERS
from megacpt.config import ModelConfig
from megacpt.errors import CheckpointError, ConfigError

_OUTSIDE = {
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "decoder.final_layernorm.bias",
    "output_layer.weight",
}
# Of a layer: how our names begin, and how theirs do.
_EXPERTS = "mlp.experts."
_BEFORE_MLP = "pre_mlp_layernorm."
_RENAMED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    _BEFORE_MLP: "mlp.linear_fc1.layer_norm_",
    "mlp.experts.linear_": "mlp.experts.experts.linear_",
    "mlp.router.choice_bias": "mlp.router.expert_bias",
}
_SAME = re.compile(
    r"(self_attention\.(linear_qkv|linear_proj)\.(weight|bias)|self_attention\.[qk]_layernorm\.weight"
    r"|mlp\.linear_fc[12]\.(weight|bias)|mlp\.shared_experts\.linear_fc[12]\.weight|mlp\.router\.weight"
    r"|(input|pre_mlp)_layernorm\.(weight|bias))$"
)
OURS_ALONE = ("mlp.router.log_u", "mlp.router.shares")
"""States of a router that Megatron's does not have: where nothing is known of them they begin anew."""


def to_theirs(suffix: str, experts: bool) -> list[str]:
    """Return Megatron's names of a tensor of a layer, behind the layer's prefix; none for a state that it has not.

    The norm before experts has two: Megatron's layers keep its name where they are Transformer Engine's, and give it
    that of an MLP where they are its own.

    Args:
        suffix: our name behind the layer's prefix.
        experts: whether the layer has experts.
    """
    if suffix in OURS_ALONE:
        return []
    found = [theirs + suffix.removeprefix(ours) for ours, theirs in _RENAMED.items() if suffix.startswith(ours)]
    return [suffix, *found] if experts and suffix.startswith(_BEFORE_MLP) else found or [suffix]


def to_ours(suffix: str) -> str | None:
    """Return our name of a tensor of a layer of Megatron's; None where it is none of a GPT model's."""
    for ours, theirs in _RENAMED.items():
        if suffix.startswith(theirs):
            return ours + suffix.removeprefix(theirs)
    return suffix if _SAME.match(suffix) else None


def names_here(shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return where each tensor of a network lies in a checkpoint of Megatron's.

    Args:
        shapes: of its tensors, by name.
        where: the checkpoint, for errors.

    Returns:
        By our name, with the numbers of layer and expert (``decoder.layers.3.mlp.experts.linear_fc1.5.weight``): the
        stored name, and the indices along its leading dims.

    Raises:
        CheckpointError: it holds tensors that are none of a GPT model's; names them.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    strange = []
    for name, shape in shapes.items():
        number, suffix = _split(name)
        ours = None if suffix is None else to_ours(suffix)
        if name in _OUTSIDE:
            found[name] = (name, ())
        elif ours is None:
            strange.append(name)
        else:
            for index in itertools.product(*map(range, shape[: _leading(number, ours)])):
                found[_full(number, ours, index)] = (name, index)
    if strange:
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        raise CheckpointError(
            f"{where} holds tensors that are none of Megatron's GPT model: {', '.join(sorted(strange)[:5])}{more}"
        )
    return found


def _leading(number: int | None, ours: str) -> int:
    """How many leading dims of a tensor number things: layers that are stacked, experts."""
    return int(number is None) + int(ours.startswith(_EXPERTS))


def _full(number: int | None, ours: str, index: tuple[int, ...]) -> str:
    """Our name of one tensor of one layer, and of one expert."""
    layer = index[0] if number is None else number
    if ours.startswith(_EXPERTS):
        ours = f"{ours.removesuffix('.weight')}.{index[-1]}.weight"
    return f"{LAYERS}{layer}.{ours}"


def _split(name: str) -> tuple[int | None, str | None]:
    """Return number and rest of a name of a layer's tensor; no rest for another name."""
    if not name.startswith(LAYERS):
        return None, None
    rest = name.removeprefix(LAYERS)
    number, _, behind = rest.partition(".")
    return (int(number), behind) if number.isdigit() else (None, rest)


def arguments(model: ModelConfig, rows: int) -> Namespace:
    """Return a model as the arguments of Megatron-LM, for its ``--use-checkpoint-args``.

    Args:
        model: the network.
        rows: of the embedding.
    """
    found: dict[str, Any] = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "group_query_attention": model.kv_heads != model.heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_dim,
        "seq_length": model.max_seq_length,
        "max_position_embeddings": model.max_seq_length,
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "rotary_percent": model.rope.share,
        "rotary_base": int(model.rope.base) if model.rope.base == int(model.rope.base) else model.rope.base,
        "use_rope_scaling": model.rope.scaling is not None,
        "swiglu": model.activation == "swiglu",
        "gated_linear_unit": model.gated,
        "add_bias_linear": model.bias,
        "add_qkv_bias": model.qkv_bias,
        "normalization": "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        "norm_epsilon": model.norm_eps,
        "layernorm_epsilon": model.norm_eps,
        "qk_layernorm": bool(model.qk_norm),
        "untie_embeddings_and_output_weights": not model.tied_embeddings,
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": model.vocab_multiple,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    if model.rope.scaling is not None and model.rope.scaling.kind == "llama3":
        found["rope_scaling_factor"] = model.rope.scaling.factor
    return Namespace(**found, **_expert_arguments(model))


def _expert_arguments(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    if moe is None:
        return {"num_experts": None}
    return {
        "num_experts": moe.experts,
        "moe_layer_freq": [int(layer) for layer in model.moe_layers],
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": model.expert_ffn,
        "moe_shared_expert_intermediate_size": moe.shared_ffn or None,
        "moe_router_score_function": moe.score,
        "moe_router_pre_softmax": not moe.renormalise,
        "moe_router_topk_scaling_factor": moe.scale if moe.scale != 1 else None,
        "moe_router_num_groups": moe.groups if moe.groups > 1 else None,
        "moe_router_group_topk": moe.groups_kept if moe.groups > 1 else None,
        "moe_router_enable_expert_bias": moe.balance.kind == "bias",
    }


_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "apply_layernorm_1p": (False, None),
    "squared_relu": (False, None),
    "multi_latent_attention": (False, None),
    "rotary_interleaved": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "window_size": (None,),
    "hybrid_override_pattern": (None,),
    "attention_output_gate": (False, None),
    "qk_l2_norm": (False, None),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "moe_shared_expert_gate": (False, None),
}
"""Arguments that change what a model computes, with the values at which they do nothing."""


def model_keys(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a `ModelConfig`, without the vocabulary, from the arguments in a checkpoint of Megatron-LM.

    Raises:
        ConfigError: an argument asks for what no network here has; names each of them.
    """
    if problems := list(_problems(given)):
        raise ConfigError("the arguments of the checkpoint ask for what is not supported:\n" + "\n".join(problems))
    heads = given["num_attention_heads"]
    keys: dict[str, Any] = {
        "layers": given["num_layers"],
        "hidden": given["hidden_size"],
        "ffn": given["ffn_hidden_size"],
        "heads": heads,
        "kv_heads": given["num_query_groups"] if given.get("group_query_attention") else heads,
        "head_dim": given.get("kv_channels") or given["hidden_size"] // heads,
        "max_seq_length": given.get("max_position_embeddings") or given.get("seq_length") or 2048,
        "activation": _activation(given),
        "norm": "rmsnorm" if given.get("normalization") == "RMSNorm" else "layernorm",
        "norm_eps": given.get("norm_epsilon") or given.get("layernorm_epsilon") or 1e-5,
        "rope": _rope(given),
        "qk_norm": bool(given.get("qk_layernorm")),
        "tied_embeddings": not given.get("untie_embeddings_and_output_weights", False),
        "bias": bool(given.get("add_bias_linear", True)),
        "qkv_bias": bool(given.get("add_qkv_bias", False)) and not given.get("add_bias_linear", True),
    }
    if given.get("num_experts"):
        keys["moe"] = _experts(given)
    return keys


def _problems(given: Mapping[str, Any]) -> Iterator[str]:
    for key, harmless in _UNSUPPORTED.items():
        if given.get(key) not in harmless:
            yield f"{key}: {given[key]}"
    if given.get("position_embedding_type", "rope") != "rope":
        yield f"position_embedding_type: {given['position_embedding_type']}: only rope is"
    if given.get("num_experts") and given.get("add_bias_linear", True):
        yield "num_experts with add_bias_linear: experts have no biases here"
    for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
        if not given.get(key):
            yield f"{key} is missing"


def _activation(given: Mapping[str, Any]) -> str:
    if given.get("swiglu"):
        return "swiglu"
    return "geglu" if given.get("gated_linear_unit") else "gelu"


def _rope(given: Mapping[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {"base": given.get("rotary_base", 10000), "share": given.get("rotary_percent", 1.0)}
    if given.get("use_rope_scaling"):  # Megatron's is that of Llama 3.1, all but its factor fixed
        keys["scaling"] = {"kind": "llama3", "factor": given.get("rope_scaling_factor") or 8.0}
    return keys


def _experts(given: Mapping[str, Any]) -> dict[str, Any]:
    pattern = given.get("moe_layer_freq", 1)
    layers = given["num_layers"]
    listed = [int(n % pattern == 0) for n in range(layers)] if isinstance(pattern, int) else [int(n) for n in pattern]
    first = listed.index(1)
    others = [n for n in range(first + 1, layers) if listed[n]]
    every = others[0] - first if others else layers
    if listed != [int(n >= first and (n - first) % every == 0) for n in range(layers)]:
        raise ConfigError(f"moe_layer_freq: {pattern}: layers with experts must come at even distances")
    groups = given.get("moe_router_num_groups")
    limits = {} if not groups else {"groups": groups, "groups_kept": given.get("moe_router_group_topk") or 1}
    topk = given.get("moe_router_topk", 2)
    sigmoid = given.get("moe_router_score_function") == "sigmoid"
    return {
        "experts": given["num_experts"],
        "top_k": topk,
        "ffn": given.get("moe_ffn_hidden_size") or given["ffn_hidden_size"],
        "shared_ffn": given.get("moe_shared_expert_intermediate_size") or 0,
        "first_dense": first,
        "every": every,
        "score": "sigmoid" if sigmoid else "softmax",
        # Megatron divides the sigmoids of several experts by their sum; its softmax comes after the choice by default.
        "renormalise": topk > 1 and (sigmoid or not given.get("moe_router_pre_softmax", False)),
        "scale": given.get("moe_router_topk_scaling_factor") or 1.0,
        **limits,
        **({"balance": {"kind": "bias"}} if given.get("moe_router_enable_expert_bias") else {}),
    }
