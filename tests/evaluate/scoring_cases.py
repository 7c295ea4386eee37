"""What the ranks of a pool run: predictions, scores and answers of small random models, in any layout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megacpt.data.stream import TokenStream
from megacpt.data.tokenizer import BytesTokenizer
from megacpt.engine.megatron import MegatronEngine
from megacpt.engine.protocol import Batch
from megacpt.errors import MegacptError
from megacpt.evaluate.instances import Instance, documents_and_loss
from megacpt.evaluate.loss import StreamLoss, evaluate_stream
from megacpt.evaluate.scoring import Continuation, Prompt, answers, log_likelihoods
from tests.checkpoint.cases import digests, step
from tests.distributed.cases import VOCAB, run_config

# Large random weights, so that the likeliest token stands out and depends on what came before.
SHARP = {"init_std": 0.25}
Pair = tuple[list[int], list[int]]


def make(model: dict[str, Any] | None = None, train: bool = False, **changes: Any) -> MegatronEngine:
    """A small random model of 4 layers and 4 heads, sequences of 32 and at most 64 tokens."""
    return MegatronEngine(run_config(model={**SHARP, **(model or {})}, **changes), VOCAB, train=train)


def logits(engine: MegatronEngine, ids: Sequence[int]) -> torch.Tensor:
    """[n, V] in float64 after each of `ids`, in one forward pass of one sequence."""
    (model,) = engine.chunks
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), None, None, runtime_gather_output=True)[0].double()


def token_by_token(engine: MegatronEngine, ids: Sequence[int], context: int) -> list[tuple[float, bool]]:
    """Nats and hit of each token behind the first `context`, by hand."""
    found = []
    for row, target in zip(logits(engine, ids[:-1])[context - 1 :], ids[context:], strict=True):
        nats = float(torch.logsumexp(row, 0) - row[target])
        found.append((nats, int(row[:VOCAB].argmax()) == target))
    return found


def predict(**changes: Any) -> dict[str, Any]:
    """The outcome of every token of 8 sequences that are dealt to the ranks in microbatches of 2, and by hand."""
    engine = make(**changes)
    rows = np.random.default_rng(3).integers(0, VOCAB, (8, 33))
    mine = rows.reshape(-1, engine.data_size, 2, 33)[:, engine.data_rank]
    found = engine.predict([Batch(tokens) for tokens in mine])
    return {"nats": found.nats, "hits": found.hits, "rows": rows}


def predicted_by_hand(rows: np.ndarray) -> dict[str, Any]:
    """The same, one sequence after the other."""
    engine = make()
    outcomes = np.array([token_by_token(engine, row.tolist(), 1) for row in rows])
    return {"nats": outcomes[..., 0], "hits": outcomes[..., 1] == 1}


def ties() -> np.ndarray:
    """The hits of a model to which every token is equally likely: targets 1, 2, 3 and so on, and targets 0."""
    engine = make()
    with torch.no_grad():
        engine.chunks[0].output_layer.weight.zero_()
    rows = np.stack((np.arange(33), np.zeros(33, dtype=np.int64)))
    return engine.predict([Batch(rows)]).hits


def documents(stream: str, tokens: int | None = None, **changes: Any) -> tuple[list[str], StreamLoss, StreamLoss]:
    """The lines of a stream's documents, its loss from them, and its loss as it is measured without them."""
    engine = make(**changes)
    opened, microbatch = TokenStream.open(stream), engine.config.batch.microbatch
    lines: list[Instance] = []
    loss = documents_and_loss(engine, "news", opened, 16, tokens, microbatch, lines.append)
    plain = evaluate_stream(engine, "news", opened, 16, tokens, microbatch)
    return [line.to_json() for line in lines], loss, plain


def documents_by_hand(stream: str) -> list[list[tuple[float, bool]]]:
    """The outcome of each token of each document, in windows of 16 tokens of the stream."""
    engine, opened = make(), TokenStream.open(stream)
    ids = opened.read(0, opened.tokens).tolist()
    flat: list[tuple[float, bool]] = []
    for begin in range(0, len(ids) - 1, 16):
        flat += token_by_token(engine, ids[begin : begin + 17], 1)
    found, at = [], -1  # the first token is predicted from nothing
    for index in range(opened.documents):
        end = at + len(opened.document(index))
        found.append(flat[max(at, 0) : end])
        at = end
    return found


def scores(pairs: list[Pair], **changes: Any) -> list[tuple[float, bool]]:
    """Log-probabilities of continuations, and whether they are greedy."""
    told: list[int] = []
    found = log_likelihoods(make(**changes), [Continuation(*pair) for pair in pairs], told.append)
    assert sum(told) == len(pairs)
    return found


def scores_by_hand(pairs: list[Pair]) -> list[tuple[float, bool]]:
    """The same, one after the other."""
    engine, found = make(), []
    for context, continuation in pairs:
        ids = [*context, *continuation][-65:]
        outcomes = token_by_token(engine, ids, len(ids) - len(continuation)) if continuation else []
        found.append((-sum(nats for nats, _ in outcomes), all(hit for _, hit in outcomes)))
    return found


def refused(pairs: list[Pair]) -> str:
    """What is said of continuations that cannot be scored."""
    try:
        scores(pairs)
    except MegacptError as error:
        return f"{type(error).__name__}: {error}"
    return "scored"


def said(prompts: list[dict[str, Any]], **changes: Any) -> list[str]:
    """The answers to prompts."""
    told: list[int] = []
    engine = make(**changes)
    found = answers(engine, BytesTokenizer(), [Prompt(**prompt) for prompt in prompts], told.append)
    assert engine.data_rank or sum(told) == len(prompts)
    return found


def beside_training(stream: str, dropout: float = 0.0, **changes: Any) -> dict[str, Any]:
    """Two steps with and without predictions and an evaluation between them; a hash of the weights after each."""

    def run(watched: bool) -> str:
        engine = make(train=True, **changes)
        for chunk in engine.chunks:
            for layer in chunk.decoder.layers:
                layer.hidden_dropout = dropout
        step(engine, 0)
        if watched:
            before = torch.get_rng_state()
            documents_and_loss(engine, "x", TokenStream.open(stream), 16, 64, 2, lambda _: None)
            evaluate_stream(engine, "x", TokenStream.open(stream), 16, 64, 2)
            log_likelihoods(engine, [Continuation([1, 2], [3, 4])])
            assert torch.equal(torch.get_rng_state(), before)
        step(engine, 1)
        return hashlib.sha256(repr(digests(engine)).encode()).hexdigest()

    return {"plain": run(False), "watched": run(True)}
