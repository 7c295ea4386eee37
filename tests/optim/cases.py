"""What the ranks of a pool run: a few steps with factors on parts of the model."""

from __future__ import annotations

from typing import Any

from megacpt.engine.megatron import MegatronEngine
from tests.distributed.cases import VOCAB, batches, run_config


def moved(changes: dict[str, Any], steps: int = 4) -> dict[str, Any]:
    """Train; return the losses and how far the weight that moved most did, by parameter, if any moved."""
    config = run_config(**changes)
    engine = MegatronEngine(config, VOCAB)
    before = {name: p.detach().clone() for chunk in engine.chunks for name, p in chunk.named_parameters()}
    losses = []
    for step in range(steps):
        mine = batches(config, step, engine.data_rank, engine.data_size)
        losses.append(engine.train_step(mine, config.optim.peak_lr, config.optim.weight_decay).loss)
    far = {
        name: float((p.detach() - before[name]).abs().max())
        for chunk in engine.chunks
        for name, p in chunk.named_parameters()
    }
    return {"losses": losses, "moved": {name: distance for name, distance in far.items() if distance > 0}}
