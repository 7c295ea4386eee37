"""A small valid run as a mapping, and changes to it."""

from __future__ import annotations

from typing import Any

from megacpt.config import RunConfig, run_from_mapping


def plain_run() -> dict[str, Any]:
    """The shortest valid run."""
    return {
        "run": "runs/english",
        "model": {"layers": 4, "hidden": 128, "ffn": 352, "heads": 8, "kv_heads": 4},
        "tokenizer": "bytes",
        "stage": {"name": "english", "tokens": "20M", "mixture": {"english": "data/english"}},
        "optim": {"peak_lr": 3e-4},
        "batch": {"sequences": 32, "seq_length": 256, "microbatch": 4},
    }


def make_run(*overrides: str) -> RunConfig:
    """The shortest valid run with overrides."""
    return run_from_mapping(plain_run(), overrides)
