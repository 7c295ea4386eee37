"""Qwen 2 and 2.5: biases on queries, keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megacpt.convert.families.llama import LLAMA
from megacpt.convert.families.settings import Settings, common_keys, window_key

if TYPE_CHECKING:
    from megacpt.config import ModelConfig


def _read(settings: Settings) -> dict[str, Any]:
    return {**common_keys(settings), "qkv_bias": True, "window": window_key(settings, first=28)}


def written_window(model: ModelConfig) -> dict[str, Any]:
    """The keys of a window in all layers, or in none."""
    layers = model.layers if model.window is None else 0
    return {
        "use_sliding_window": model.window is not None,
        "sliding_window": model.window,
        "max_window_layers": layers,
    }


QWEN2 = replace(
    LLAMA,
    name="qwen2",
    title="a Qwen 2",
    architecture="Qwen2ForCausalLM",
    read=_read,
    write=written_window,
    features={"activation": ("swiglu", "geglu"), "qkv_bias": (True,), "window": (False, True)},
    refused=lambda _: iter(()),
)
