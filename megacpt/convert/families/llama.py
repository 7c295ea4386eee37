"""Llama 2 and 3, and what has their form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megacpt.convert.families.decoder import (
    ATTENTION_OUTPUT,
    HEAD_NORMS,
    INPUT_NORM,
    MLP,
    MLP_NORM,
    QUERY_KEY_VALUE,
)
from megacpt.convert.families.features import reasons
from megacpt.convert.families.settings import Settings, common_config, common_keys
from megacpt.convert.families.table import Family
from megacpt.errors import ConfigError

if TYPE_CHECKING:
    from megacpt.config import ModelConfig


def _read(settings: Settings) -> dict[str, Any]:
    keys = common_keys(settings)
    biases = [bool(settings.get(key, False)) for key in ("attention_bias", "mlp_bias")]
    if biases[0] != biases[1]:
        why = "here biases are on all linear layers of the blocks, or on none"
        settings.refuse("attention_bias, mlp_bias", f"{biases[0]}, {biases[1]}".lower(), why)
    return {**keys, "bias": biases[0]}


def _write(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": model.bias or model.qkv_bias, "mlp_bias": model.bias}


def _refused(model: ModelConfig) -> Iterator[str]:
    if model.qkv_bias and not model.bias:
        yield "model.qkv_bias: a Llama with biases on queries, keys and values has one on the output of attention too"


LLAMA = Family(
    name="llama",
    title="a Llama",
    architecture="LlamaForCausalLM",
    layer="model.layers.{}",
    embedding="model.embed_tokens",
    norm="model.norm",
    head="lm_head",
    # Norms of heads are not in a Llama, but in what is packed under its names.
    entries=(INPUT_NORM, QUERY_KEY_VALUE, *HEAD_NORMS, ATTENTION_OUTPUT, MLP_NORM, *MLP),
    read=_read,
    write=_write,
    features={"activation": ("swiglu", "geglu"), "bias": (False, True), "qkv_bias": (False, True)},
    refused=_refused,
)


def check_names(model: ModelConfig) -> None:
    """Refuse a network whose tensors `LLAMA` has no names for.

    Raises:
        ConfigError: it has experts, an MLP without a gate, or another order of things than a Llama.
    """
    if model.moe is not None:
        raise ConfigError(
            "model.moe: packing, rounding, counting and exports know the matrices of a Llama, which has no experts; "
            "such a model is trained, evaluated and averaged, and generates from its checkpoint"
        )
    if not model.gated:
        raise ConfigError(
            f"model.activation: {model.activation} has no gate, and packing, rounding, counting and exports know the "
            "matrices of a Llama, whose MLP has one"
        )
    named = {"qk_norm": (False, True), "qkv_bias": (False, True), "rope.share": (model.rope.share,)}
    found = list(reasons(model, LLAMA.title, {**LLAMA.features, **named}))
    if found:
        raise ConfigError("this model has no form under the names of a Llama:\n" + "\n".join(found))


def check_llama(model: ModelConfig) -> None:
    """Refuse a network that is no Llama, naming every reason.

    Raises:
        ConfigError: the key, and why transformers' Llama cannot compute it.
    """
    check_names(model)
    LLAMA.check(model)


def llama_config(model: ModelConfig, vocab: int, eod: int, dtype: str) -> dict[str, Any]:
    """Return config.json of a Llama; arguments as `common_config`."""
    return common_config(LLAMA, model, vocab, eod, dtype)
