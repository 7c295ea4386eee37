"""What the rank of a pool runs: the engine beside the plain loop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from megacpt.bench.llama_peer import llama_cpp
from megacpt.bench.plain import PlainLoop
from megacpt.bench.step import bench_config, bench_step
from megacpt.config import ModelConfig
from megacpt.engine.megatron import MegatronEngine
from megacpt.errors import MegacptError
from tests.distributed.cases import VOCAB, batches, run_config


def side_by_side(changes: dict[str, Any], steps: int = 5, padded: bool = False) -> dict[str, Any]:
    """Losses and norms of both over some steps, from the same weights."""
    config = run_config(**changes)
    engine = MegatronEngine(config, VOCAB)
    plain = PlainLoop(config, VOCAB, torch.device("cpu"))
    plain.load(engine.chunks[0].named_parameters())
    reports: dict[str, list[Any]] = {"engine": [], "plain": []}
    for step in range(steps):
        for name, side in (("engine", engine), ("plain", plain)):
            reports[name].append(side.train_step(batches(config, step, 0, 1, padded), 3e-3, 0.1))
    return {name: [(r.loss, r.grad_norm, r.tokens) for r in found] for name, found in reports.items()}


def measured(overrides: list[str], blocks: int = 2, sabotage: bool = False) -> dict[str, Any] | str:
    """The result of `bench_step` on a very small model, or the message of its error."""
    sizes = ["model.layers=2", "model.hidden=32", "model.ffn=48", "model.heads=2", "model.kv_heads=2"]
    short = ["batch.sequences=4", "batch.seq_length=16"]
    config = bench_config(None, None, [*sizes, *short, *overrides])
    load = PlainLoop.load
    if sabotage:
        PlainLoop.load = lambda *_: None  # type: ignore[method-assign]
    try:
        return bench_step(config, blocks).model_dump(mode="json")
    except MegacptError as error:
        return str(error)
    finally:
        PlainLoop.load = load  # type: ignore[method-assign]


def beside_llama_cpp(python: str, path: str, folder: Path) -> list[int] | str:
    """The tokens that the worker for llama.cpp gives under an interpreter, or the message of its error."""
    model = ModelConfig.model_validate(
        {"name": "small", "layers": 1, "hidden": 32, "ffn": 48, "heads": 2, "vocab_size": 300, "vocab_multiple": 1}
    )
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path
    try:
        with llama_cpp(Path(python), model, folder, threads=1, context=20) as peer:
            peer.run([1, 2, 3], 2)
            return peer.run([1, 2, 3, 4, 5], 4)[2]
    except MegacptError as error:
        return str(error)
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
