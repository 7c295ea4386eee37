"""Mistral 7B: a Llama that may attend to a window."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megacpt.convert.families.llama import LLAMA
from megacpt.convert.families.settings import Settings, common_keys, window_key

if TYPE_CHECKING:
    from megacpt.config import ModelConfig


def _read(settings: Settings) -> dict[str, Any]:
    return {**common_keys(settings), "window": window_key(settings)}


def _write(model: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": model.window}


MISTRAL = replace(
    LLAMA,
    name="mistral",
    title="a Mistral",
    architecture="MistralForCausalLM",
    read=_read,
    write=_write,
    features={"activation": ("swiglu", "geglu"), "window": (False, True)},
    refused=lambda _: iter(()),
)
