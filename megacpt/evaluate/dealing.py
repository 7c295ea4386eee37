"""Dealing windows of tokens to the data-parallel ranks, so that every rank runs the same number of microbatches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from megacpt.engine.protocol import Batch, Engine

Window = tuple[np.ndarray, np.ndarray]
"""ids [L + 1] as int64, and [L] bool: which of the predictions count."""

# Microbatches that go through the engine at once; bounds the memory, not the result.
MICROBATCHES = 16


def groups(engine: Engine, windows: Iterable[Window], microbatch: int) -> Iterator[list[Window]]:
    """Cut `windows` into as many as go through the engine at once; the last ones may be fewer.

    Args:
        engine: says how many ranks share the work, and what its pipeline wants.
        windows: all of them, the same on every rank.
        microbatch: sequences a data-parallel rank takes at a time.
    """
    rest = iter(windows)
    while group := list(islice(rest, group_size(engine, microbatch))):
        yield group


def group_size(engine: Engine, microbatch: int) -> int:
    """The number of windows that go through the engine at once."""
    multiple = engine.microbatch_multiple
    return -(-MICROBATCHES // multiple) * multiple * microbatch * engine.data_size


def deal(engine: Engine, group: Sequence[Window], microbatch: int) -> list[Batch]:
    """This data-parallel rank's microbatches of a group, in the order that `engine.predict` gives its rows in.

    What is missing at the end is filled with sequences that do not count, up to what pipelines want.

    Args:
        engine: says which rank this is.
        group: windows of the same length, at least one.
        microbatch: sequences a data-parallel rank takes at a time.
    """
    together = microbatch * engine.data_size * engine.microbatch_multiple
    ids, valid = group[0]
    blank = (np.zeros_like(ids), np.zeros_like(valid))
    filled = [*group, *[blank] * (-len(group) % together)]
    first = engine.data_rank * microbatch
    mine = [filled[at : at + microbatch] for at in range(first, len(filled), microbatch * engine.data_size)]
    return [Batch(*(np.stack(part) for part in zip(*rows, strict=True))) for rows in mine]
