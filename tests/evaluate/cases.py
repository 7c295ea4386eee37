"""What the ranks of a pool run: generation with small random models, in any tensor-parallel layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megacpt.engine.megatron import MegatronEngine
from megacpt.evaluate.generation import cached_model, generate
from tests.distributed.cases import VOCAB, run_config

# Large random weights, so that the likeliest token stands out and depends on what came before.
SHARP = {"layers": 2, "init_std": 0.25}


def _engine(model: dict[str, Any], parallel: dict[str, Any] | None = None) -> MegatronEngine:
    config = run_config(model={**SHARP, **model}, parallel=parallel or {})
    return MegatronEngine(config, VOCAB, train=False)


def _tokens(count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(5).integers(0, VOCAB, count)]


def _full(engine: MegatronEngine, tokens: list[int]) -> torch.Tensor:
    """Logits at every position, in one forward pass without a cache."""
    (model,) = engine.chunks
    model.eval()
    with torch.no_grad():
        ids = torch.tensor([tokens])
        return model(ids, None, None, runtime_gather_output=True)[0].float()


def cached_logits(model: dict[str, Any], pieces: list[int], parallel: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read tokens in pieces through the cache, and all at once without it."""
    engine = _engine(model, parallel)
    tokens = _tokens(sum(pieces))
    full = _full(engine, tokens)
    cached, ends, start = [], [], 0
    with cached_model(engine, len(tokens)) as feed:
        for piece in pieces:
            cached.append(feed(tokens[start : start + piece]))
            start += piece
            ends.append(start - 1)
    return {"cached": torch.stack(cached), "full": full[ends]}


def greedy(prompt: int, max_tokens: int) -> dict[str, Any]:
    """Generate greedily, and by the argmax of full forward passes."""
    engine = _engine({})
    tokens = _tokens(prompt)
    found = generate(engine, tokens, max_tokens, vocab_size=VOCAB)
    grown = list(tokens)
    for _ in found:
        grown.append(int(_full(engine, grown)[-1, :VOCAB].argmax()))
    return {"found": found, "expected": grown[prompt:]}


def sampled(parallel: dict[str, Any] | None = None, disturb: bool = False, **arguments: Any) -> list[int]:
    """Generate with the arguments; `disturb` moves torch's and numpy's global generators on first."""
    engine = _engine({"tied_embeddings": True}, parallel)
    if disturb:
        torch.manual_seed(99)
        np.random.seed(99)
    return generate(engine, _tokens(8), vocab_size=VOCAB, **arguments)


def stopped(max_tokens: int) -> dict[str, Any]:
    """Generate greedily past nothing, then with the third token as the end of the document."""
    engine = _engine({})
    heard: list[int] = []
    whole = generate(engine, _tokens(8), max_tokens, vocab_size=VOCAB, on_token=heard.append)
    ended = generate(engine, _tokens(8), max_tokens, vocab_size=VOCAB, eod=whole[2])
    begun = generate(engine, [], max_tokens, vocab_size=VOCAB, eod=256)
    again = generate(engine, [256], max_tokens, vocab_size=VOCAB, eod=256)
    training = engine.chunks[0].training
    return {"whole": whole, "heard": heard, "ended": ended, "begun": (begun, again), "training": training}


def vocabulary(size: int) -> list[int]:
    """Generate with only the first `size` ids allowed."""
    return generate(_engine({}), [1, 2, 3], 40, temperature=5.0, vocab_size=size)


def refused(parallel: dict[str, Any] | None = None, prompt: int = 4, max_tokens: int = 4, **arguments: Any) -> str:
    """Name of the error and its message."""
    from megacpt.errors import MegacptError

    engine = _engine({}, parallel)
    try:
        generate(engine, _tokens(prompt), max_tokens, vocab_size=VOCAB, **arguments)
    except MegacptError as error:
        return f"{type(error).__name__}: {error}"
    return "generated"


def longest() -> tuple[int, int]:
    """How many tokens come when far more are asked for than the model is meant for; and its longest sequence."""
    engine = _engine({})
    found = generate(engine, _tokens(50), 1000, vocab_size=VOCAB)
    return len(found), engine.config.model.max_seq_length
