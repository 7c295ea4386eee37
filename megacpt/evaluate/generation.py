"""Text generation with a key and value cache, on one rank or under tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megacpt.engine.megatron import MegatronEngine
from megacpt.errors import LayoutError
from megacpt.evaluate.sampling import Sampling
from megacpt.evaluate.token_loop import checked_prompt, continue_prompt
from megacpt.runtime.layout import Layout


def generate(
    engine: MegatronEngine,
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

    The same arguments give the same tokens: the draws come from a generator of their own. Every rank computes and
    returns all of them.

    Args:
        engine: the model, in a layout without pipeline, context and sequence parallelism.
        tokens: the prompt; empty begins a document, for which `eod` is needed.
        max_tokens: how many tokens to add at most.
        temperature: see `Sampling`, as `top_k` and `top_p`.
        top_k: see `Sampling`.
        top_p: see `Sampling`.
        seed: of the draws.
        eod: the token that ends a document; None goes on past it.
        vocab_size: ids of the tokenizer; those that only pad the embedding are never chosen.
        on_token: is called with each new token as it comes; the text ends behind a token for which it returns True.

    Returns:
        The new tokens, without the prompt and without the `eod` that ended them.

    Raises:
        LayoutError: the layout spreads a sequence, or the layers, over ranks.
        ConfigError: the prompt leaves no room in `model.max_seq_length`, or an argument is out of range.
    """
    sampling = Sampling(temperature, top_k, top_p)
    prompt = checked_prompt(tokens, max_tokens, eod, engine.config.model.max_seq_length, vocab_size)
    end = min(len(prompt) + max_tokens, engine.config.model.max_seq_length)
    with cached_model(engine, end) as feed:
        return continue_prompt(feed, prompt, end, sampling, seed, eod, vocab_size=vocab_size, on_token=on_token)


@contextmanager
def cached_model(engine: MegatronEngine, capacity: int) -> Iterator[Callable[[Sequence[int]], Tensor]]:
    """A function that reads further tokens of one sequence and gives the logits after the last, [V] float32.

    What has been read stays in a cache of keys and values of the size of `capacity` tokens. V is the padded
    vocabulary. The model is in evaluation mode inside.

    Raises:
        LayoutError: the layout spreads a sequence, or the layers, over ranks.
    """
    _check_layout(engine.layout, bool(engine.moe_layers))
    (model,) = engine.chunks
    cache = StaticInferenceContext(max_batch_size=1, max_sequence_length=capacity)
    was_training = model.training

    def feed(tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([list(tokens)], dtype=torch.int64, device=engine.device)
        logits: Tensor = model(
            input_ids=ids,
            position_ids=None,
            attention_mask=None,
            inference_context=cache,
            runtime_gather_output=True,
        )
        cache.increment_sequence_len_offset(ids.shape[1])
        return logits[0, -1].float()

    model.eval()
    try:
        with torch.no_grad():
            yield feed
    finally:
        model.train(was_training)


def _check_layout(layout: Layout, experts: bool) -> None:
    # Ranks that share experts go through each layer together, and their prompts have different lengths.
    axes = ("pipeline", "context", "expert", *["tensor"] * experts)
    wrong = [f"parallel.{axis}=1" for axis in axes if getattr(layout, axis) > 1]
    wrong += ["parallel.sequence=false"] * layout.sequence
    if wrong:
        stays = "" if experts else " (parallel.tensor may stay)"
        raise LayoutError(
            f"generation reads one token at a time and needs whole layers and sequences on a rank, not {layout}: "
            f"set {' '.join(wrong)}{stays}"
        )
