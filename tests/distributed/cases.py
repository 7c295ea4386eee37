"""What the ranks of a pool run: small trainings on synthetic tokens, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megacpt.config import RunConfig
from megacpt.engine.megatron import MegatronEngine
from megacpt.engine.protocol import Batch

VOCAB = 257
MODEL = {
    "layers": 4,
    "hidden": 64,
    "ffn": 96,
    "heads": 4,
    "kv_heads": 2,
    "max_seq_length": 64,
    "vocab_multiple": 64,
}


def run_config(**changes: Any) -> RunConfig:
    """Return a small run; `changes` are sections of the configuration."""
    sections: dict[str, Any] = {
        "run": "unused",
        "seed": 11,
        "model": MODEL,
        "tokenizer": "bytes",
        "stage": {"name": "synthetic", "tokens": "1M", "mixture": {"synthetic": "unused"}},
        "schedule": {"kind": "constant"},
        "optim": {"peak_lr": 1e-2, "clip": 0.5},
        "batch": {"sequences": 8, "seq_length": 32, "microbatch": 2},
    }
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(sections.get(key), dict)
        sections[key] = {**sections[key], **value} if both else value
    return RunConfig.model_validate(sections)


def batches(config: RunConfig, step: int, rank: int, size: int, padded: bool = False) -> list[Batch]:
    """Return one rank's microbatches of a global batch that depends on the step alone."""
    draw = np.random.default_rng(step)
    whole = draw.integers(0, VOCAB, (config.batch.sequences, config.batch.seq_length + 1))
    valid = draw.random((config.batch.sequences, config.batch.seq_length)) < 0.7 if padded else None
    each = config.batch.microbatch
    found = []
    for first in range(rank * each, len(whole), size * each):
        rows = slice(first, first + each)
        found.append(Batch(whole[rows], None if valid is None else valid[rows]))
    return found


def train(
    changes: dict[str, Any],
    steps: int = 5,
    first: int = 0,
    load: str | None = None,
    save: str | None = None,
    padded: bool = False,
) -> dict[str, Any]:
    """Train some steps, loading before and saving after if asked; return losses, norms and a weight checksum."""
    from megacpt.checkpoint.tensors import load_tensors, save_tensors

    config = run_config(**changes)
    engine = MegatronEngine(config, VOCAB)
    if load:
        engine.load(load_tensors(engine.state(), Path(load)))
    losses, norms = [], []
    for step in range(first, first + steps):
        mine = batches(config, step, engine.data_rank, engine.data_size, padded)
        report = engine.train_step(mine, config.optim.peak_lr, config.optim.weight_decay)
        losses.append(report.loss)
        norms.append(report.grad_norm)
    if save:
        save_tensors(engine.state(), Path(save))
    evaluation = engine.evaluate(batches(config, 999, engine.data_rank, engine.data_size, padded))
    weights = [float(p.detach().double().sum()) for chunk in engine.chunks for p in chunk.parameters()]
    buffers = [float(b.double().abs().sum()) for router in engine.routers for b in (router.log_u, router.choice_bias)]
    return {
        "losses": losses,
        "norms": norms,
        "evaluation": evaluation,
        "weights": weights,
        "statistics": report.statistics,
        "buffers": buffers,
    }
