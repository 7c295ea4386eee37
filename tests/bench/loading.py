"""What a fresh process runs: all that a loader hands over."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from megacpt.bench import loaders
from megacpt.engine.protocol import Batch


def counted(side: str, work: loaders.Work) -> dict[str, Any]:
    """How often each id is an input, how many samples there are, and the shapes of microbatches."""
    if side != loaders.OURS:
        loaders._ready_for_megatron()
    counts, samples, shapes = np.zeros(256, np.int64), 0, set()
    for batch in loaders._SIDES[side](work):
        ids = _inputs(batch)
        shapes.add(ids.shape)
        samples += len(ids)
        counts += np.bincount(ids.reshape(-1), minlength=256)
    return {"counts": counts.tolist(), "samples": samples, "shapes": shapes}


def _inputs(batch: Any) -> np.ndarray:
    if isinstance(batch, Batch):
        return batch.tokens[:, :-1]
    return np.asarray(batch["tokens"]) if isinstance(batch, dict) else batch[:, :-1]


def die() -> None:
    """End the process without a word, as the kernel does when memory runs out."""
    os._exit(9)
