"""What the rank of a pool runs: a checkpoint and the folder that was packed from it, beside each other."""

from __future__ import annotations

from pathlib import Path

from megacpt.continuation.opened import open_model
from megacpt.evaluate.generation import cached_model
from megacpt.evaluate.generation import generate as from_checkpoint
from megacpt.serve.generation import generate as from_folder
from megacpt.serve.opened import open_decoder


def side_by_side(run: Path, folder: Path, prompts: list[str], max_tokens: int) -> dict[str, list[list[int]]]:
    """Greedy and sampled tokens of both."""
    engine, tokenizer, _ = open_model(run)
    decoder, same = open_decoder(folder)
    assert same.fingerprint == tokenizer.fingerprint
    found: dict[str, list[list[int]]] = {"checkpoint": [], "folder": []}
    for prompt in prompts:
        for settings in ({}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 3}):
            tokens = [int(token) for token in tokenizer.encode(prompt)]
            arguments = {"max_tokens": max_tokens, "vocab_size": tokenizer.vocab_size, **settings}
            found["checkpoint"].append(from_checkpoint(engine, tokens, **arguments))  # type: ignore[arg-type]
            found["folder"].append(from_folder(decoder, tokens, **arguments))  # type: ignore[arg-type]
    return found


def distance(run: Path, folder: Path, text: str) -> tuple[float, float]:
    """The largest difference of the logits of both, token by token, and the largest logit."""
    engine, tokenizer, _ = open_model(run)
    decoder, _ = open_decoder(folder)
    tokens = [int(token) for token in tokenizer.encode(text)]
    cache, far, size = decoder.cache(), 0.0, 0.0
    with cached_model(engine, len(tokens)) as feed:
        for token in tokens:
            ours, theirs = decoder.feed([token], cache), feed([token])
            far, size = max(far, float((ours - theirs).abs().max())), max(size, float(theirs.abs().max()))
    return far, size
