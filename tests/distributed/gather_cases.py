"""What the ranks of a pool run: steps of the distributed optimizer, with what they leave behind and what they send."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer

from megacpt.checkpoint.tensors import load_tensors, save_tensors
from megacpt.engine.megatron import MegatronEngine
from tests.distributed.cases import VOCAB, batches, run_config


def _bits(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _step(engine: MegatronEngine, step: int) -> Any:
    config = engine.config
    mine = batches(config, step, engine.data_rank, engine.data_size)
    return engine.train_step(mine, config.optim.peak_lr, config.optim.weight_decay)


def train(
    changes: dict[str, Any], steps: int = 5, first: int = 0, load: str | None = None, save: str | None = None
) -> dict[str, Any]:
    """Everything that some steps report, and the bits of what a checkpoint would hold after them."""
    engine = MegatronEngine(run_config(**changes), VOCAB)
    if load:
        engine.load(load_tensors(engine.state(), Path(load)))
    reports = [_step(engine, step) for step in range(first, first + steps)]
    if save:
        save_tensors(engine.state(), Path(save))
    return {
        "steps": [(report.loss, report.grad_norm, report.statistics) for report in reports],
        "evaluation": engine.evaluate(batches(engine.config, 999, engine.data_rank, engine.data_size)),
        "state": {name: _bits(part.data) for name, part in engine.state().items()},
        "matrices": [_bits(each.cache.matrix()) for each in engine.quantisers.all],
        "scales": [_bits(each.scales) for each in engine.quantisers.all],
    }


def sent(changes: dict[str, Any]) -> dict[str, int]:
    """The bytes that come and go in the gather of a step, and the numbers that it is about."""
    engine = MegatronEngine(run_config(**changes), VOCAB)
    moved = {"codes": 0, "full": 0}
    broadcast, all_gather = dist.broadcast, param_and_grad_buffer.dist_all_gather_func

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        if tensor.dtype is torch.uint8:  # Megatron too broadcasts a number or two
            moved["codes"] += tensor.numel()
        return broadcast(tensor, *args, **options)

    def counted_whole(whole: torch.Tensor, *args: Any, **options: Any) -> Any:
        moved["full"] += whole.numel() * whole.itemsize
        return all_gather(whole, *args, **options)

    with (
        patch.object(dist, "broadcast", counted),
        patch.object(param_and_grad_buffer, "dist_all_gather_func", counted_whole),
    ):
        _step(engine, 0)
    matrices = {id(each.weight): each.weight.numel() for each in engine.quantisers.all}
    parameters = {id(p): p.numel() for p in engine.chunks[0].parameters()}
    return {**moved, "ternary": sum(matrices.values()), "all": sum(parameters.values())}
