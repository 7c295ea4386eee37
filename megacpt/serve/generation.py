"""Generation from a folder that was written for use, without the training engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from megacpt.evaluate.sampling import Sampling
from megacpt.evaluate.token_loop import checked_prompt, continue_prompt
from megacpt.serve.decoder import Decoder


def generate(
    decoder: Decoder,
    tokens: Sequence[int],
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eod: int | None = None,
    *,
    vocab_size: int,
    on_token: Callable[[int], bool | None] | None = None,
) -> list[int]:
    """Continue `tokens` until the end of a document, `max_tokens`, or the model's longest sequence.

    Arguments and result are those of `megacpt.evaluate.generation.generate`, with a decoder in the place of an engine.

    Raises:
        ConfigError: the prompt leaves no room in `model.max_seq_length`, or an argument is out of range.
    """
    sampling = Sampling(temperature, top_k, top_p)
    prompt = checked_prompt(tokens, max_tokens, eod, decoder.model.max_seq_length, vocab_size)
    end = min(len(prompt) + max_tokens, decoder.model.max_seq_length)
    feed = partial(decoder.feed, cache=decoder.cache(end))
    return continue_prompt(feed, prompt, end, sampling, seed, eod, vocab_size=vocab_size, on_token=on_token)
