"""Loss on held-out streams, in nats a token and bits a byte."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megacpt.data.batches import eval_windows
from megacpt.data.stream import TokenStream
from megacpt.engine.protocol import Engine
from megacpt.evaluate.dealing import deal, groups


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

    @classmethod
    def of(cls, name: str, stream: TokenStream, nats: float, tokens: int) -> StreamLoss:
        """The loss of a stream of which `tokens` predictions cost `nats` together."""
        bytes_per_token = stream.meta.bytes / stream.tokens
        return cls(name, nats / tokens, nats / tokens / math.log(2) / bytes_per_token, tokens)


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
    for group in groups(engine, eval_windows(stream, seq_length, max_tokens), microbatch):
        more_nats, more_tokens = engine.evaluate(deal(engine, group, microbatch))
        nats, tokens = nats + more_nats, tokens + more_tokens
    return StreamLoss.of(name, stream, nats, tokens)
