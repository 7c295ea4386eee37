"""The model as the lm-eval package wants it. Only `lm_eval` imports this, and says so where the package is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megacpt.data.tokenizer import Tokenizer
from megacpt.engine.megatron import MegatronEngine
from megacpt.evaluate.scoring import Advance, Continuation, Prompt, answers, log_likelihoods

log = logging.getLogger(__name__)

Progress = Callable[[str, int], Advance]
"""Is told what begins and how many questions there are, and returns what is told of each that is answered."""


class MegacptLM(TemplateLM):
    """Answers lm-eval's requests; every rank is given all of them, and the engine shares the work.

    A text is split into context and continuation as lm-eval does for every causal model. An empty context is the
    end-of-document token, as every document begins behind one in training.

    Args:
        engine: the model.
        tokenizer: the model's.
        progress: hears how far it is.
    """

    backend = "causal"

    def __init__(self, engine: MegatronEngine, tokenizer: Tokenizer, progress: Progress) -> None:
        super().__init__()
        self.engine, self.encoder, self.progress = engine, tokenizer, progress
        self.max_length = engine.config.model.max_seq_length

    @property
    def eot_token_id(self) -> int:
        """The end of a document."""
        return self.encoder.eod

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells tokenizers apart by."""
        return self.encoder.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: ARG002
        """The ids of a text; there is never a mark of its beginning."""
        ids: list[int] = self.encoder.encode(string).tolist()
        return ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is the greedy one."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """The same for requests (texts, context ids, continuation ids)."""
        asked = [Continuation(context, continuation) for _, context, continuation in requests]
        found = log_likelihoods(self.engine, asked, self.progress("continuations", len(asked)))
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """Log-probability of whole texts, in windows that predict each token once with as much context as fits."""
        asked: list[Continuation] = []
        owner: list[int] = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                asked.append(Continuation(*make_disjoint_window(window)))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (nats, _) in zip(
            owner, log_likelihoods(self.engine, asked, self.progress("texts", len(asked))), strict=True
        ):
            totals[i] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """The answer to each prompt, up to one of the task's stop texts."""
        texts = [request.args for request in requests]
        prompts = [self._prompt(context, settings, seed) for seed, (context, settings) in enumerate(texts)]
        found = answers(self.engine, self.encoder, prompts, self.progress("answers", len(prompts)))
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return found

    def _prompt(self, context: str, asked: dict[str, Any], seed: int) -> Prompt:
        """A request of lm-eval as a prompt that fits the model: its beginning is cut off to leave room for the answer.

        At least half of the longest sequence is kept for the context.
        """
        settings: dict[str, Any] = dict(normalize_gen_kwargs(asked))
        room = min(settings["max_gen_toks"], self.max_length // 2)
        sampled = settings["do_sample"]
        return Prompt(
            tokens=self.tok_encode(context)[-(self.max_length - room) :],
            max_tokens=settings["max_gen_toks"],
            stop=tuple(stop for stop in settings["until"] if stop),
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_k=settings.get("top_k") if sampled else None,
            top_p=settings.get("top_p") if sampled else None,
            seed=seed,
        )
