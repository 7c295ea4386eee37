"""What the ranks of a pool run: logits of a checkpoint in any layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megacpt.continuation.opened import open_model
from megacpt.convert.from_hf import from_hf
from megacpt.evaluate.generation import generate


def logits(checkpoint: str, prompts: list[list[int]], overrides: list[str]) -> list[np.ndarray] | None:
    """Logits after each token of each prompt, [tokens, V]; None on ranks that are not of the last pipeline stage."""
    engine, _, _ = open_model(Path(checkpoint), overrides=overrides)
    for chunk in engine.chunks:
        chunk.eval()
    found = []
    for prompt in prompts:
        with torch.no_grad():
            outcomes: list[Tensor] = engine.schedule(
                forward_step_func=_forward,
                data_iterator=[iter([prompt]) for _ in engine.wrapped],
                model=engine.wrapped,
                num_microbatches=1,
                seq_length=len(prompt),
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        found += [outcome[0].float().numpy() for outcome in outcomes]
    return found or None


def _forward(batches: Iterator[list[int]], model: Any) -> tuple[Tensor, Any]:
    tokens = torch.tensor([next(batches)])
    return model(input_ids=tokens, position_ids=None, attention_mask=None), _whole


def _whole(part: Tensor, non_loss_data: bool = True) -> Tensor:  # noqa: ARG001
    """The whole vocabulary, of the parts of the ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def greedy(checkpoint: str, prompt: list[int], count: int, rows: int) -> list[int]:
    """The likeliest tokens behind a prompt, of the whole embedding."""
    engine, _, _ = open_model(Path(checkpoint))
    return generate(engine, prompt, count, vocab_size=rows)


def told(folder: str, out: str, stop: int | None = None) -> int:
    """Convert, stopped by a person after `stop` blocks; return how many blocks were made."""
    blocks: list[int] = []

    def progress(done: int, _: int) -> None:
        if done - 1 == stop:
            raise KeyboardInterrupt
        blocks.append(done)

    with suppress(KeyboardInterrupt):
        from_hf(Path(folder), Path(out), "bytes", progress=progress)
    return len(blocks)
