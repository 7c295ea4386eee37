"""What a model thinks of given texts, and what it answers to them: the questions that benchmarks ask.

The work is shared by the data-parallel ranks; every rank asks everything and gets every answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from megacpt.data.tokenizer import Tokenizer
from megacpt.engine.megatron import MegatronEngine
from megacpt.errors import ConfigError
from megacpt.evaluate.dealing import Window, deal, group_size
from megacpt.evaluate.generation import generate
from megacpt.evaluate.text_stream import TextStream
from megacpt.runtime.layout import Layout

Advance = Callable[[int], object]
"""Is told how many more questions have been answered."""


def _nothing(_count: int) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class Continuation:
    """A text of which some tokens are given.

    Attributes:
        context: the given tokens; one at least.
        tokens: those whose probability is asked for.
    """

    context: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Prompt:
    """A text to continue.

    Attributes:
        tokens: the text; empty begins a document.
        max_tokens: of the answer.
        stop: texts before which the answer ends.
        temperature: see `sampling.Sampling`, as `top_k` and `top_p`.
        top_k: see `sampling.Sampling`.
        top_p: see `sampling.Sampling`.
        seed: of the draws.
    """

    tokens: Sequence[int]
    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


def log_likelihoods(
    engine: MegatronEngine, asked: Sequence[Continuation], advance: Advance = _nothing
) -> list[tuple[float, bool]]:
    """Log-probability in nats of each continuation, and whether it is what the model would say greedily.

    Contexts that do not fit `model.max_seq_length` lose their beginning. Texts of like length go through the model
    together, as many as `batch.microbatch` sequences of `batch.seq_length` tokens would be.

    Raises:
        ConfigError: a continuation alone is longer than the model's longest sequence.
    """
    config, longest = engine.config, engine.config.model.max_seq_length
    windows = [_window(one, longest) for one in asked]
    rest = sorted(range(len(asked)), key=lambda i: -len(windows[i][1]))
    found: list[tuple[float, bool]] = [(0.0, True)] * len(asked)
    while rest:
        length = _padded(len(windows[rest[0]][1]), engine.layout)
        rows = config.batch.microbatch * config.batch.seq_length // length
        rows = max(1, min(rows, -(-len(rest) // engine.data_size)))
        size = group_size(engine, rows)
        now, rest = rest[:size], rest[size:]
        outcomes = engine.predict(deal(engine, [_stretched(windows[i], length) for i in now], rows))
        for i, nats, hits in zip(now, outcomes.nats, outcomes.hits, strict=False):
            valid = np.flatnonzero(windows[i][1])
            found[i] = (-float(nats[valid].sum(dtype=np.float64)), bool(hits[valid].all()))
        advance(len(now))
    return found


def _window(asked: Continuation, longest: int) -> Window:
    """The ids of a text, and which of its tokens are asked for."""
    if not asked.context:
        raise ConfigError("a continuation needs a context of one token at least: give the end-of-document token")
    if len(asked.tokens) > longest:
        raise ConfigError(
            f"a continuation has {len(asked.tokens):,} tokens, and model.max_seq_length is {longest:,}: leave out the "
            "task that asks for it, or cut its texts"
        )
    ids = np.array([*asked.context, *asked.tokens], dtype=np.int64)[-(longest + 1) :]
    return ids, np.arange(len(ids) - 1) >= len(ids) - 1 - len(asked.tokens)


def _stretched(window: Window, length: int) -> Window:
    """The window with padding behind it, where it changes nothing before it."""
    ids, valid = window
    more = length - len(valid)
    return np.pad(ids, (0, more)), np.pad(valid, (0, more))


def _padded(length: int, layout: Layout) -> int:
    """The next length, from 1, that the layout can cut into equal parts."""
    multiple = (2 * layout.context if layout.context > 1 else 1) * (layout.tensor if layout.sequence else 1)
    return -(-max(length, 1) // multiple) * multiple


def answers(
    engine: MegatronEngine, tokenizer: Tokenizer, prompts: Sequence[Prompt], advance: Advance = _nothing
) -> list[str]:
    """What the model says to each prompt, up to a stop text, the end of the document or `max_tokens`.

    Raises:
        LayoutError: the layout spreads a sequence, or the layers, over ranks.
        ConfigError: a prompt is too long, or its sampling is out of range.
    """
    mine = {}
    for i in range(engine.data_rank, len(prompts), engine.data_size):
        mine[i] = _answer(engine, tokenizer, prompts[i])
        advance(min(engine.data_size, len(prompts) - i))
    everyone: list[dict[int, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = {i: text for one in everyone for i, text in one.items()}
    return [found[i] for i in range(len(prompts))]


def _answer(engine: MegatronEngine, tokenizer: Tokenizer, prompt: Prompt) -> str:
    stream, text = TextStream(tokenizer, prompt.tokens), ""

    def heard(token: int) -> bool:
        nonlocal text
        text += stream.add(token)
        return any(stop in text for stop in prompt.stop)

    generate(
        engine,
        prompt.tokens,
        prompt.max_tokens,
        prompt.temperature,
        prompt.top_k,
        prompt.top_p,
        prompt.seed,
        tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
        on_token=heard,
    )
    text += stream.end()
    return text[: min((at for stop in prompt.stop if (at := text.find(stop)) >= 0), default=len(text))]
