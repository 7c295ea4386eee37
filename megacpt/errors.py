"""Errors that a user can act on: what is wrong, in which key or file, and what to change."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MegacptError(Exception):
    """A mistake or an obstacle outside the program; the command line shows its text alone, without a traceback."""

    exit_code = 2


class ConfigError(MegacptError):
    """A key or a value of the configuration is wrong."""


class LayoutError(ConfigError):
    """The parallel layout does not fit the model, the batch or the number of ranks."""


class DataError(MegacptError):
    """A stream, a tokenizer or a text file is not what it should be."""


class CheckpointError(MegacptError):
    """A checkpoint is missing, damaged or does not belong to this run."""


class SetupError(MegacptError):
    """The machine or the installation lacks something, or holds something it should not."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word nearest to `word`, or an empty string."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""
