"""Streams and run configurations that train in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from megacpt.config import RunConfig
from megacpt.data.prepare import prepare

WORDS = {
    "english": [
        "the",
        "of",
        "a",
        "sea",
        "and",
        "to",
        "in",
        "he",
        "was",
        "it",
        "for",
        "on",
        "old",
        "ship",
        "wind",
        "with",
        "night",
        "sailor",
    ],
    "python": [
        "def",
        "return",
        "self",
        "import",
        "for",
        "in",
        "range",
        "(",
        ")",
        ":",
        "=",
        "+",
        "[",
        "]",
        "if",
        "else",
        "None",
        "lambda",
    ],
    "c": [
        "int",
        "char",
        "*",
        "&",
        ";",
        "{",
        "}",
        "void",
        "struct",
        "sizeof",
        "(",
        ")",
        "->",
        "while",
        "static",
        "const",
    ],
}
MODEL = {"layers": 2, "hidden": 32, "ffn": 48, "heads": 2, "kv_heads": 1, "vocab_multiple": 64, "max_seq_length": 64}
STEP = 8 * 16
"""Tokens of an optimizer step of `run_config`."""


def make_stream(folder: Path, name: str, documents: int = 60, seed: int = 0) -> Path:
    """Prepare a byte stream of made-up documents in the manner of `name`, and return its folder."""
    draw = random.Random(f"{name}{seed}")
    source = folder / f"{name}.jsonl"
    texts = (" ".join(draw.choices(WORDS[name.split("-")[0]], k=draw.randint(5, 25))) for _ in range(documents))
    folder.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([source], "bytes", folder / name, workers=1, progress=False)
    return folder / name


def make_streams(folder: Path) -> dict[str, str]:
    """Prepare one stream of every kind, and a held-out one of each; return their folders by name."""
    names = [f"{name}{part}" for name in WORDS for part in ("", "-valid")]
    return {name: str(make_stream(folder, name, 12 if name.endswith("-valid") else 60)) for name in names}


def run_mapping(run: Path | str, mixture: dict[str, Any], steps: int = 6, **changes: Any) -> dict[str, Any]:
    """Return the keys of a small run; `changes` are sections that are laid over them."""
    sections: dict[str, Any] = {
        "run": str(run),
        "seed": 5,
        "model": MODEL,
        "tokenizer": "bytes",
        "stage": {"name": "first", "tokens": steps * STEP, "mixture": mixture},
        "schedule": {"kind": "infinite", "warmup": "2 steps", "cooldown": "4 steps"},
        "optim": {"peak_lr": 1e-2},
        "batch": {"sequences": 8, "seq_length": 16, "microbatch": 2},
        "checkpoint": {"every": "2 steps", "keep_last": None},
        "log": {"every": "1 steps", "tensorboard": False},
    }
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(sections.get(key), dict) and "kind" not in value
        sections[key] = {**sections[key], **value} if both else value
    return sections


def run_config(run: Path | str, mixture: dict[str, Any], steps: int = 6, **changes: Any) -> RunConfig:
    """Return a small run, checked; arguments as `run_mapping`."""
    return RunConfig.model_validate(run_mapping(run, mixture, steps, **changes))
