"""Loss on held-out streams, in nats a token and bits a byte."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megacpt.data.batches import eval_windows
from megacpt.data.stream import TokenStream
from megacpt.engine.protocol import Batch, Engine

# Microbatches that go through the engine at once; bounds the memory, not the result.
MICROBATCHES = 16


@dataclass(frozen=True)
class StreamLoss:
    """How well a model predicts a stream.

    Attributes:
        stream: the stream's name.
        loss: nats a token.
        bits_per_byte: bits a byte of UTF-8 text, comparable between tokenizers.
        tokens: predicted tokens.
    """

    stream: str
    loss: float
    bits_per_byte: float
    tokens: int


def evaluate_stream(
    engine: Engine, name: str, stream: TokenStream, seq_length: int, max_tokens: int | None, microbatch: int
) -> StreamLoss:
    """Measure a stream from its start; every rank calls this and gets the same answer.

    Args:
        engine: holds the model.
        name: how the stream is called.
        stream: held-out tokens.
        seq_length: tokens the model sees at once.
        max_tokens: predictions to measure; None for the whole stream.
        microbatch: sequences a data-parallel rank takes at a time.
    """
    nats, tokens = 0.0, 0
    for batches in _groups(engine, stream, seq_length, max_tokens, microbatch):
        more_nats, more_tokens = engine.evaluate(batches)
        nats, tokens = nats + more_nats, tokens + more_tokens
    bytes_per_token = stream.meta.bytes / stream.tokens
    return StreamLoss(name, nats / tokens, nats / tokens / math.log(2) / bytes_per_token, tokens)


def _groups(
    engine: Engine, stream: TokenStream, seq_length: int, max_tokens: int | None, microbatch: int
) -> Iterator[list[Batch]]:
    """Deal the windows to the data-parallel ranks, the same number of microbatches to each.

    What is missing at the end is filled with microbatches that do not count, up to what pipelines want.
    """
    rows = microbatch * engine.data_size
    multiple = engine.microbatch_multiple
    most = -(-MICROBATCHES // multiple) * multiple
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    group: list[Batch] = []
    for window in eval_windows(stream, seq_length, max_tokens):
        pending.append(window)
        if len(pending) == rows:
            group.append(_mine(engine, pending, microbatch))
            pending = []
        if len(group) == most:
            yield group
            group = []
    empty = (np.zeros(seq_length + 1, dtype=np.int64), np.zeros(seq_length, dtype=bool))
    if pending:
        pending += [empty] * (rows - len(pending))
        group.append(_mine(engine, pending, microbatch))
    if group:
        blank = Batch(*(np.stack([x] * microbatch) for x in empty))
        yield group + [blank] * (-len(group) % multiple)


def _mine(engine: Engine, windows: list[tuple[np.ndarray, np.ndarray]], microbatch: int) -> Batch:
    first = engine.data_rank * microbatch
    tokens, valid = zip(*windows[first : first + microbatch], strict=True)
    return Batch(np.stack(tokens), np.stack(valid))
