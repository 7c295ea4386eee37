"""The runs of the demo: one trunk, two ways to continue it, and a release of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megacpt.config import RunConfig, overlay, run_from_mapping

# 0.4M parameters without the embeddings: small enough for two CPU cores, large enough to learn and to forget.
MODEL = {"name": "demo", "layers": 3, "hidden": 96, "ffn": 256, "heads": 4, "kv_heads": 2, "max_seq_length": 256}
TRUNK_TOKENS = 2_000_000
STREAMS = ("english", "python", "c")


def trunk(folder: Path, streams: Mapping[str, Path], tokens: int, seed: int) -> RunConfig:
    """Train new weights on English under the infinite schedule.

    Args:
        folder: of the run.
        streams: token streams by name, held-out ones as ``NAME-valid``.
        tokens: length of the stage.
        seed: of weights and data order.
    """
    return run_from_mapping(
        {
            "run": str(folder),
            "seed": seed,
            "model": MODEL,
            "tokenizer": "bytes",
            "stage": {"name": "english", "tokens": tokens, "mixture": {"english": str(streams["english"])}},
            "schedule": {"kind": "infinite", "warmup": "2%", "cooldown": "60%"},
            "optim": {"peak_lr": 4e-3},
            "batch": {"sequences": 16, "seq_length": 256, "microbatch": 16},
            "checkpoint": {"every": "20%", "keep_last": 1},
            "evaluate": {
                "every": "20%",
                "dense": "16 steps",
                "tokens": max(2_000, min(32_000, tokens // 50)),
                "streams": {name: str(streams[f"{name}-valid"]) for name in STREAMS},
            },
            "log": {"every": "2 steps"},
        },
        source="the demo",
    )


def continued(parent: RunConfig, folder: Path, stream: Path, tokens: int, replay: float) -> RunConfig:
    """Continue on Python, with a share of the samples replayed from English."""
    stage: dict[str, Any] = {
        "name": "python",
        "tokens": tokens,
        "mixture": {"python": str(stream)},
        "replay": {"share": replay, "policy": "seen"},
    }
    return overlay(parent, {"stage": stage}, run=folder)
