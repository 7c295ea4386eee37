"""Sums of measures, as a recipe writes them: ``release.mean - cosine.mean``, ``0.5 * a.english + 0.5 * b.english``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from megacpt.errors import ConfigError

_TERM = re.compile(r"(?:(?P<factor>\d+(?:\.\d*)?(?:e-?\d+)?)\s*\*\s*)?(?P<run>\S+)\.(?P<measure>[\w-]+)")


@dataclass(frozen=True)
class Term:
    """`factor` times a `measure` of a `run`."""

    factor: float
    run: str
    measure: str


@dataclass(frozen=True)
class Formula:
    """A sum of terms."""

    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, text: str) -> Formula:
        """Read a formula; signs stand between spaces, since names may hold them.

        Raises:
            ConfigError: if `text` is none.
        """
        first, *rest = re.split(r"\s+([+-])\s+", text.strip())
        signs, words = ["+", *rest[::2]], [first, *rest[1::2]]
        return cls(tuple(_term(sign, word, text) for sign, word in zip(signs, words, strict=True)))

    def value(self, of: Callable[[str, str], float]) -> float:
        """Return the sum; `of` gives the measure of a run."""
        return sum(term.factor * of(term.run, term.measure) for term in self.terms)


def _term(sign: str, word: str, text: str) -> Term:
    found = _TERM.fullmatch(word)
    if found is None:
        raise ConfigError(
            f"'{text}': '{word}' is no term: write RUN.MEASURE or NUMBER * RUN.MEASURE, with ' - ' or ' + '"
        )
    factor = float(found["factor"] or 1)
    return Term(-factor if sign == "-" else factor, found["run"], found["measure"])
