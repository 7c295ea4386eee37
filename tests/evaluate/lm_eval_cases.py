"""What the ranks of a pool run: tasks of lm-eval on local files, without a network."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megacpt.data.tokenizer import BytesTokenizer
from megacpt.errors import MegacptError
from megacpt.evaluate.lm_eval import TaskResults, evaluate_tasks
from tests.evaluate.scoring_cases import make, token_by_token

LENGTH = {"max_seq_length": 64}


@contextmanager
def no_network() -> Iterator[list[Any]]:
    """Whatever Python tries to reach beyond this machine fails, and is noted."""
    tried: list[Any] = []
    kept = socket.socket.connect, socket.getaddrinfo

    def refuse(*arguments: Any, **_: Any) -> Any:
        tried.append(arguments)
        raise OSError("there is no network")

    socket.socket.connect = refuse  # type: ignore[method-assign]
    socket.getaddrinfo = refuse
    try:
        yield tried
    finally:
        socket.socket.connect, socket.getaddrinfo = kept  # type: ignore[method-assign]


def tasks(
    folder: str, cache: str, names: list[str], limit: int | None = None, fewshot: int | None = None, **changes: Any
) -> TaskResults:
    """The results of tasks in `folder`; asserts that nothing was looked for on a network."""
    os.environ["HF_HOME"] = cache
    engine = make(LENGTH, **changes)
    asked: list[tuple[str, int]] = []
    told: list[int] = []

    def progress(what: str, count: int) -> Any:
        asked.append((what, count))
        return told.append

    with no_network() as tried:
        found = evaluate_tasks(engine, BytesTokenizer(), names, Path(folder), limit, fewshot, progress)
    assert not tried, tried
    assert engine.data_rank or sum(told) == sum(count for _, count in asked)
    return found


def refused(folder: str | None, cache: str, names: list[str]) -> str:
    """What is said of tasks that cannot be run."""
    os.environ["HF_HOME"] = cache
    os.environ["HF_HUB_OFFLINE"] = "1"  # or the packages would try a network again and again
    try:
        with no_network():
            evaluate_tasks(make(LENGTH), BytesTokenizer(), names, None if folder is None else Path(folder))
    except MegacptError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def by_hand(questions: list[dict[str, Any]], shots: str = "") -> dict[str, Any]:
    """Log-probabilities of each choice of each question behind `shots`, and of each text as a document."""
    engine, encode = make(LENGTH), BytesTokenizer().encode
    choices, texts = [], []
    for one in questions:
        context = encode(shots + one["question"]).tolist()
        scores = []
        for choice in one["choices"]:
            ids = [*context, *encode(choice).tolist()]
            scores.append(-sum(nats for nats, _ in token_by_token(engine, ids, len(context))))
        choices.append(scores)
        texts.append(-sum(nats for nats, _ in token_by_token(engine, [256, *encode(one["text"]).tolist()], 1)))
    return {"choices": choices, "texts": texts}


def bits_per_byte(texts: list[float], questions: list[dict[str, Any]]) -> float:
    """Of the texts together."""
    return -sum(texts) / math.log(2) / sum(len(one["text"].encode()) for one in questions)
