"""What a rank runs: lm-eval's requests to a run here, and to its export through lm-eval's own backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from megacpt.continuation.opened import open_model
from megacpt.evaluate.lm_eval_model import MegacptLM


def _instances(requests: list[list[str]]) -> list[Any]:
    return [Instance("loglikelihood", {}, tuple(request), i) for i, request in enumerate(requests)]


def scored_here(folder: str, requests: list[list[str]]) -> list[tuple[float, bool]]:
    """Log-probability of each continuation, and whether it is the greedy one."""
    engine, tokenizer, _ = open_model(Path(folder))
    return MegacptLM(engine, tokenizer, lambda *_: lambda _: None).loglikelihood(_instances(requests))


def scored_by_hugging_face(folder: str, requests: list[list[str]]) -> list[tuple[float, bool]]:
    """The same of an export."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
    found: list[tuple[float, bool]] = model.loglikelihood(_instances(requests), disable_tqdm=True)
    return found
