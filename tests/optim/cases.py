"""What the ranks of a pool run: a few steps with factors on parts of the model, frozen parts, other optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megacpt.checkpoint.store import Store, load_checkpoint
from megacpt.engine.megatron import MegatronEngine
from megacpt.optim.moments import Carry
from tests.checkpoint.cases import digests
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


def stage(
    changes: dict[str, Any],
    steps: int = 3,
    first: int = 0,
    load: str | None = None,
    save: str | None = None,
    carry: dict[str, tuple[float, float, float]] | None = None,
) -> dict[str, Any]:
    """Train a stage on a checkpoint, whose optimizer's state goes on as `carry` says (see `Carry`).

    Returns:
        ``losses`` and ``norms`` by step; ``before`` and ``after``: a hash of every tensor of the engine's state;
        ``counts``: how many updates each mean has seen, by name of the parameter, after.
    """
    config = run_config(**changes)
    engine = MegatronEngine(config, VOCAB)
    if load is not None:
        load_checkpoint(Path(load), engine, boundary=True)
    engine.carry({name: Carry(*values) for name, values in (carry or {}).items()})
    before = digests(engine)
    losses, norms = [], []
    for step in range(first, first + steps):
        mine = batches(config, step, engine.data_rank, engine.data_size)
        report = engine.train_step(mine, config.optim.peak_lr, config.optim.weight_decay)
        losses.append(report.loss)
        norms.append(report.grad_norm)
    if save is not None:
        Store(Path(save).parent.parent).save(int(Path(save).name[-8:]), engine.state(), {})
    counts = {name.removesuffix("/count"): float(part.data) for name, part in engine.state().items() if "count" in name}
    return {"losses": losses, "norms": norms, "before": before, "after": digests(engine), "counts": counts}
