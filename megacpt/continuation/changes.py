"""What differs between the settings of two runs, key by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megacpt.config import RunConfig

# What decides the numbers of a run. The rest (layout, microbatch, logging, saving, evaluation) may change at any time.
SECTIONS = ("seed", "model", "stage", "schedule", "optim", "precision", "batch")
# Where things are and what they are called. Of streams and the tokenizer the content matters, which the plan names.
FREE = ("model.name", "batch.microbatch")


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by dotted key; a list is a value."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        here = prefix + key
        found.update(flat(inner, here + ".") if isinstance(inner, Mapping) else {here: inner})
    return found


def settings(config: RunConfig) -> dict[str, Any]:
    """Return what decides the numbers of a run by dotted key, without the paths of its streams."""
    found = flat(config.model_dump(mode="json", include=set(SECTIONS)))
    if config.stage.controller is not None:
        # What is measured, and when, decides the mixture.
        measured = config.evaluate.model_dump(mode="json")
        found |= flat({"evaluate": {**measured, "streams": sorted(config.evaluate.streams)}})
    return {key: value for key, value in found.items() if key not in FREE and not _is_path(key)}


def _is_path(key: str) -> bool:
    return key.startswith("stage.") and key.endswith(".path")


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, with the value before and after; None where there is no such key.

    Where the `kind` of a section changed, keys that only one of both kinds has are left out; of a stream that only one
    side has, all but the weight.
    """
    keys = [*before, *(key for key in after if key not in before)]
    found = {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}
    kinds = {key for key in found if key.endswith(".kind") and key in before and key in after}
    streams = {key for key in found if key.endswith(".weight") and (key not in before or key not in after)}
    whole = tuple(key.rpartition(".")[0] + "." for key in (*kinds, *streams))
    return {
        key: pair
        for key, pair in found.items()
        if (key in before and key in after) or key in streams or not key.startswith(whole)
    }


def shown(value: Any) -> str:
    """Return a value as a message shows it."""
    return "(none)" if value is None else str(value)
