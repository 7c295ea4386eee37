"""Qwen 3: a norm on the queries and keys of each head, no biases."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megacpt.convert.families.llama import LLAMA
from megacpt.convert.families.qwen2 import written_window
from megacpt.convert.families.settings import Settings, common_keys, window_key

if TYPE_CHECKING:
    from megacpt.config import ModelConfig


def qwen3_keys(settings: Settings, first: int = 28) -> dict[str, Any]:
    """Return the keys of a `ModelConfig` that dense models and those with experts share; `first` as in `window_key`."""
    settings.only("attention_bias", (False,), "a model with norms on queries and keys has no biases here", False)
    keys = common_keys(settings)
    head_dim = settings.get("head_dim", 128)  # not hidden / heads, where the file does not say it
    return {**keys, "head_dim": head_dim, "qk_norm": True, "window": window_key(settings, first)}


def _write(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": False, **written_window(model)}


QWEN3 = replace(
    LLAMA,
    name="qwen3",
    title="a Qwen 3",
    architecture="Qwen3ForCausalLM",
    read=qwen3_keys,
    write=_write,
    features={"activation": ("swiglu", "geglu"), "qk_norm": (True,), "window": (False, True)},
    refused=lambda _: iter(()),
)
