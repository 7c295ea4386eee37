"""The loop of generation, whatever gives the logits: check the prompt, choose a token, feed it back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megacpt.errors import ConfigError
from megacpt.evaluate.sampling import Sampling

Feed = Callable[[Sequence[int]], Tensor]
"""Reads further tokens of a sequence and gives the logits after the last, [V] float32."""


def continue_prompt(
    feed: Feed,
    prompt: Sequence[int],
    end: int,
    sampling: Sampling,
    seed: int = 0,
    eod: int | None = None,
    *,
    vocab_size: int,
    on_token: Callable[[int], bool | None] | None = None,
) -> list[int]:
    """Choose tokens one by one and feed each back, until `eod` or until the sequence has `end` tokens.

    Args:
        feed: the model; it has read nothing yet.
        prompt: the first tokens, of `checked_prompt`.
        end: tokens of the whole sequence, the prompt included.
        sampling: how a token is chosen.
        seed: of the draws.
        eod: the token that ends a document; None goes on past it.
        vocab_size: ids of the tokenizer; those that only pad the embedding are never chosen.
        on_token: is called with each new token; the text ends behind one for which it returns True.

    Returns:
        The new tokens, without the prompt and without the `eod` that ended them.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    pending = prompt
    while len(prompt) + len(found) < end:
        token = sampling.choose(feed(pending)[:vocab_size], generator)
        if token == eod:
            break
        found.append(token)
        if on_token is not None and on_token(token):
            break
        pending = [token]
    return found


def checked_prompt(tokens: Sequence[int], max_tokens: int, eod: int | None, longest: int, vocab_size: int) -> list[int]:
    """The prompt as ids that a model can read.

    Args:
        tokens: the prompt; empty begins a document, for which `eod` is needed.
        max_tokens: how many tokens will be added at most.
        eod: the token that ends a document, if there is one.
        longest: `model.max_seq_length`.
        vocab_size: ids of the tokenizer.

    Raises:
        ConfigError: the prompt leaves no room in `longest`, has an unknown id or is empty, or `max_tokens` is below 1.
    """
    prompt = [int(token) for token in tokens] or ([] if eod is None else [eod])
    if not prompt:
        raise ConfigError("the prompt is empty, and without an end-of-document token there is nothing to begin with")
    if max_tokens < 1:
        raise ConfigError(f"max-tokens {max_tokens}: must be 1 or more")
    if len(prompt) >= longest:
        raise ConfigError(
            f"the prompt has {len(prompt):,} tokens, and model.max_seq_length is {longest:,}: at most {longest - 1:,} "
            "leave room for an answer; shorten the prompt"
        )
    if not all(0 <= token < vocab_size for token in prompt):
        raise ConfigError(f"the prompt has a token outside the vocabulary of {vocab_size:,}")
    return prompt
