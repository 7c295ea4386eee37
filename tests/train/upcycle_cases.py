"""What the ranks of a pool run: dense models of a few steps, and models with experts that begin as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacpt.checkpoint.store import Store, load_checkpoint
from megacpt.continuation.upcycle import load_upcycled
from megacpt.engine.megatron import MegatronEngine
from tests.distributed.cases import VOCAB, batches, run_config

LATER = 999


def _steps(engine: MegatronEngine, first: int, count: int) -> list[float]:
    """Train some steps; return their losses, each before its update."""
    config = engine.config
    return [
        engine.train_step(batches(config, step, engine.data_rank, engine.data_size), 1e-2, 0.1).loss
        for step in range(first, first + count)
    ]


def _tensors(engine: MegatronEngine) -> dict[str, Tensor]:
    """Every tensor of a single process's state by its global name; layers of a dense model one by one."""
    found = {}
    for part in engine.state().values():
        stacked, data = part.key.partition("decoder.layers."), part.data.detach().clone()
        parts = part.build() if hasattr(part, "build") else [part]
        if stacked[1] and not stacked[2][0].isdigit():
            found[f"{stacked[0]}decoder.layers.{parts[0].global_offset[0]}.{stacked[2]}"] = data
        else:
            found[part.key] = data
    return found


def dense(run: str, changes: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    """Train a dense model, write its checkpoint, and return what it loses on other tokens and in the next steps."""
    config = run_config(**changes)
    engine = MegatronEngine(config, VOCAB)
    _steps(engine, 0, steps)
    made = Store(Path(run)).save(steps, engine.state(), {})
    loss, _ = engine.evaluate(batches(config, LATER, engine.data_rank, engine.data_size))
    return {"checkpoint": str(made), "evaluation": loss, "losses": _steps(engine, steps, 1)}


def upcycled(checkpoint: str, how: Any, changes: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    """Begin with experts on a dense checkpoint; return the loss on other tokens and the losses of the next steps."""
    config = run_config(**changes)
    engine = MegatronEngine(config, VOCAB)
    load_upcycled(Path(checkpoint), engine, config.model.layers, how)
    loss, _ = engine.evaluate(batches(config, LATER, engine.data_rank, engine.data_size))
    return {"evaluation": loss, "losses": _steps(engine, 3, steps)}


def tensors(checkpoint: str, before: dict[str, Any], how: Any, after: dict[str, Any]) -> tuple[dict[str, Tensor], ...]:
    """Return the tensors of a dense checkpoint, those it becomes, and those of a new model with experts."""
    old = MegatronEngine(run_config(**before), VOCAB)
    load_checkpoint(Path(checkpoint), old, boundary=True)
    config = run_config(**after)
    engine = MegatronEngine(config, VOCAB)
    new = _tensors(engine)
    load_upcycled(Path(checkpoint), engine, config.model.layers, how)
    return _tensors(old), _tensors(engine), new


def rounded(checkpoint: str, how: Any, changes: dict[str, Any]) -> bool:
    """Whether the first stored expert of a model in bfloat16 has the float32 weights of the dense model behind it."""
    config = run_config(**changes)
    engine = MegatronEngine(config, VOCAB)
    load_upcycled(Path(checkpoint), engine, config.model.layers, how)
    found = _tensors(engine)["decoder.layers.0.mlp.experts.linear_fc2.weight"]
    return bool((found != found.to(torch.bfloat16)).any())
