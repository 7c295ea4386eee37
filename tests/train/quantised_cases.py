"""What the ranks of a pool run: a checkpoint with quantised matrices, opened to be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megacpt.continuation.opened import open_model
from megacpt.evaluate.generation import generate
from tests.distributed.cases import batches


def use(checkpoint: str, overrides: list[str]) -> dict[str, Any]:
    """The loss of a made-up batch, how many sizes weights have, and a text beside that of plain forward passes."""
    engine, tokenizer, config = open_model(Path(checkpoint), overrides=overrides)
    evaluation = engine.evaluate(batches(config, 1, engine.data_rank, engine.data_size))
    prompt = list(tokenizer.encode("the old ship"))
    told = generate(engine, prompt, 12, vocab_size=tokenizer.vocab_size)
    (chunk,) = engine.chunks
    tokens = list(prompt)
    with torch.no_grad():
        for _ in told:
            logits = chunk(torch.tensor([tokens]), None, None, runtime_gather_output=True)
            tokens.append(int(logits[0, -1, : tokenizer.vocab_size].argmax()))
    sizes = [len(each.cache.matrix().abs().unique()) for each in engine.quantisers.all]
    return {"evaluation": evaluation, "told": told, "expected": tokens[len(prompt) :], "sizes": sizes}
