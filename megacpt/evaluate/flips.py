r"""What a later checkpoint gets wrong that an earlier one got right, prediction by prediction.

A mean hides it: a model may gain as many answers as it loses. With :math:`r_p, r'_p` for whether prediction :math:`p`
of :math:`n` is right before and after:

- negative flips, :math:`\frac{1}{n} |\{p : r_p \wedge \neg r'_p\}|`: right before, wrong after;
- positive flips, :math:`\frac{1}{n} |\{p : \neg r_p \wedge r'_p\}|`: wrong before, right after. Positive minus negative
  flips are the change of accuracy;
- relative negative flips: negative flips over :math:`a (1 - a')`, what two models of the accuracies :math:`a, a'`
  would show if their mistakes had nothing to do with each other. 1 says that the later model is as good as unrelated
  to the earlier, 0 that it lost nothing (Yan et al. 2021, arXiv 2011.09161);
- worse: the share of documents that cost more nats than before.

For a stream a prediction is a token, right where it was the likeliest; for a task it is a question.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megacpt.errors import DataError
from megacpt.evaluate.instances import Header, Instance, read_record

WORST = 5


@dataclass(frozen=True)
class Worse:
    """A document whose loss rose.

    Attributes:
        index: its number in the stream.
        before: nats a token.
        after: nats a token.
    """

    index: int
    before: float
    after: float


@dataclass
class Flips:
    """How the predictions of one stream, or the answers of one task, changed.

    Attributes:
        stream: its name.
        instances: documents or questions.
        predictions: tokens or questions.
        hits_before: predictions that were right before.
        hits_after: and after.
        lost: right before, wrong after.
        won: wrong before, right after.
        documents_worse: documents that cost more nats; None for a task.
        worst: the documents whose loss a token rose most, the worst first.
    """

    stream: str
    instances: int = 0
    predictions: int = 0
    hits_before: int = 0
    hits_after: int = 0
    lost: int = 0
    won: int = 0
    documents_worse: int | None = None
    worst: list[Worse] = field(default_factory=list)

    @property
    def negative(self) -> float:
        """Negative flips, as a share of the predictions."""
        return self.lost / self.predictions

    @property
    def positive(self) -> float:
        """Positive flips, as a share of the predictions."""
        return self.won / self.predictions

    @property
    def relative(self) -> float | None:
        """Relative negative flips; None where unrelated models would have none either."""
        unrelated = self.hits_before * (self.predictions - self.hits_after) / self.predictions
        return self.lost / unrelated if unrelated else None

    @property
    def worse(self) -> float | None:
        """The share of documents that cost more nats; None for a task."""
        return None if self.documents_worse is None else self.documents_worse / self.instances

    def to_dict(self) -> dict[str, Any]:
        """Counts and shares, as JSON."""
        shares = {name: getattr(self, name) for name in ("negative", "positive", "relative", "worse")}
        return {**asdict(self), **shares}

    def add(self, before: Instance, after: Instance) -> None:
        """Count one instance as it was and as it is."""
        self.instances += 1
        self.predictions += before.tokens
        self.hits_before += int(before.hit.sum())
        self.hits_after += int(after.hit.sum())
        self.lost += int((before.hit & ~after.hit).sum())
        self.won += int((~before.hit & after.hit).sum())
        if before.nats is None or after.nats is None:
            return
        self.documents_worse = (self.documents_worse or 0) + (after.nats > before.nats)
        if after.nats > before.nats:
            found = Worse(before.index, before.nats / before.tokens, after.nats / after.tokens)
            self.worst = heapq.nlargest(WORST, [*self.worst, found], key=lambda worse: worse.after - worse.before)


def compare(before: Path, after: Path) -> list[Flips]:
    """Compare two instance records, stream by stream and task by task.

    The files are read side by side, an instance at a time, whatever their size.

    Raises:
        DataError: a record is missing or damaged, or the two did not measure the same.
    """
    (header, old), (other, new) = read_record(before), read_record(after)
    _check_headers(header, other)
    found: dict[str, Flips] = {}
    for was, is_now in _pairs(old, new, before, after):
        found.setdefault(was.stream, Flips(was.stream)).add(was, is_now)
    return list(found.values())


def _check_headers(before: Header, after: Header) -> None:
    if before.tokenizer != after.tokenizer:
        raise DataError(
            f"the records of {before.checkpoint} and {after.checkpoint} were made with other tokenizers, so that their "
            "tokens differ; compare them in bits a byte (`megacpt eval`)"
        )
    for name in before.streams.keys() | after.streams.keys():
        if before.streams.get(name) != after.streams.get(name):
            missing = [header.checkpoint for header in (before, after) if name not in header.streams]
            why = f"is not in the record of {missing[0]}" if missing else "has other content in the two records"
            raise DataError(f"'{name}' {why}: measure both checkpoints on the same streams and tasks")


def _pairs(
    old: Iterator[Instance], new: Iterator[Instance], before: Path, after: Path
) -> Iterator[tuple[Instance, Instance]]:
    """The same instance in both records."""
    for was, is_now in zip_longest(old, new):
        if was is None or is_now is None:
            raise DataError(f"{before if was is None else after} ends early: measure both with the same --tokens")
        if (was.stream, was.index, was.tokens) != (is_now.stream, is_now.index, is_now.tokens):
            names = " and ".join(f"{x.stream} {x.index} ({x.tokens} predictions)" for x in (was, is_now))
            raise DataError(
                f"{before} and {after} did not measure the same: {names} stand in the same place; measure both with "
                "the same streams and tasks in the same order, --tokens and --limit"
            )
        yield was, is_now
