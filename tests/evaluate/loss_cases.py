"""What the ranks of a pool run: held-out losses of a small model in any layout."""

from __future__ import annotations

from typing import Any

import torch

from megacpt.data.stream import TokenStream
from megacpt.engine.megatron import MegatronEngine
from megacpt.evaluate.loss import StreamLoss, evaluate_stream
from tests.checkpoint.cases import digests, engine, step


def _evaluate(trained: MegatronEngine, stream: str, microbatch: int, tokens: int | None) -> StreamLoss:
    return evaluate_stream(trained, "held-out", TokenStream.open(stream), 16, tokens, microbatch)


def evaluate(stream: str, microbatch: int = 2, tokens: int | None = None, **changes: Any) -> StreamLoss:
    """The loss of a new model that has made one step."""
    trained = engine(**changes)
    step(trained, 0)
    return _evaluate(trained, stream, microbatch, tokens)


def uniform(stream: str) -> tuple[StreamLoss, int]:
    """The loss of a model that holds every entry of the padded vocabulary equally likely, and their number."""
    trained = engine()
    with torch.no_grad():
        trained.chunks[0].output_layer.weight.zero_()
    return _evaluate(trained, stream, 2, None), trained.chunks[0].output_layer.weight.shape[0]


def by_hand(stream: str, tokens: int | None) -> tuple[float, StreamLoss]:
    """The summed nats of a stream, one prediction after the other in float64; and what `evaluate_stream` says."""
    trained = engine()
    step(trained, 0)
    model = trained.chunks[0].eval()
    held_out = TokenStream.open(stream)
    ids = torch.from_numpy(held_out.read(0, held_out.tokens))
    targets = len(ids) - 1 if tokens is None else tokens
    nats = 0.0
    for begin in range(0, targets, 16):
        inputs = ids[begin : min(begin + 16, targets)]
        with torch.no_grad():
            logits = model(inputs[None], None, None, runtime_gather_output=True)[0].double()
        for place, row in enumerate(logits):
            nats += float(torch.logsumexp(row, 0) - row[ids[begin + place + 1]])
    return nats, _evaluate(trained, stream, 3, tokens)


def beside_training(stream: str, **changes: Any) -> dict[str, Any]:
    """Two steps with and without an evaluation between them."""
    plain, watched = engine(**changes), None
    step(plain, 0)
    step(plain, 1)
    expected = digests(plain)
    watched = engine(**changes)
    step(watched, 0)
    before = digests(watched)
    _evaluate(watched, stream, 2, None)
    after = digests(watched)
    step(watched, 1)
    return {"untouched": before == after, "same": digests(watched) == expected}
