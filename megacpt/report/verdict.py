"""What was learned and what was forgotten, in two sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from megacpt.report.outcome import Outcome
from megacpt.report.words import plain

NOTICEABLE = 0.005  # bits a byte; less is written as 0.00 in the sentences


def verdict(found: Outcome, others: Mapping[str, Outcome]) -> str:
    """Return the sentences as HTML.

    Args:
        found: the subject.
        others: what came of other lines, by name.
    """
    sentences = [_learned(found), *_later(found, others)]
    return " ".join(filter(None, sentences)) or "No held-out stream has been trained on yet."


def _learned(found: Outcome) -> str:
    """The streams that the newest stage with new streams brought in."""
    newest = max(found.homes.values(), default=None)
    learned = []
    for stream, home in found.homes.items():
        before, now = found.before(stream), found.losses[-1].get(stream)
        if home == newest and before is not None and now is not None:
            learned.append(f"<b>{escape(stream)}</b> from {before:.2f} to {now:.2f} bits a byte")
    return f"Learned {_listed(learned)}." if learned else ""


def _later(found: Outcome, others: Mapping[str, Outcome]) -> list[str]:
    """How the older streams changed since their own stages; in brackets how they did in the other lines."""
    forgot: list[str] = []
    kept: list[str] = []
    for stream, value in found.changed[-1].items():
        beside = [
            f"{plain(lost, 2)} with {escape(name)}"
            for name, other in others.items()
            if (lost := other.changed[-1].get(stream)) is not None and not lost < NOTICEABLE
        ]
        if value < NOTICEABLE:
            better = f", better by {plain(-value, 2)}" if value <= -NOTICEABLE else ""
            lost_elsewhere = f" (forgotten by {_listed(beside)})" if beside else ""
            kept.append(f"<b>{escape(stream)}</b>{better}{lost_elsewhere}")
        else:  # also a loss that is not a number
            words = f" (by {_listed(beside)})" if beside else ""
            forgot.append(f"<b>{escape(stream)}</b> by {plain(value, 2)}{words}")
    sentences = [("worse", "Forgot", forgot), ("better", "Kept", kept)]
    return [f'<span class="{tone}">{verb}</span> {_listed(words)}.' for tone, verb, words in sentences if words]


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
