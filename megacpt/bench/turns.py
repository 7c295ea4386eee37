"""Functions timed in turns, block by block, so that whatever else the machine does hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

_BLOCK_SECONDS = 0.02
_MOST_CALLS = 1000


def time_in_turns(
    sides: Mapping[str, Callable[[], object]],
    blocks: int,
    heard: Callable[[], None] = lambda: None,
    seconds: float = _BLOCK_SECONDS,
) -> dict[str, list[list[float]]]:
    """Time each function in `blocks` blocks, taking turns; the seconds of a call, the mean of each block.

    Args:
        sides: the functions by name.
        blocks: blocks of calls for each.
        heard: is called after each turn of all.
        seconds: a block calls a function until about so much time is over, at least once.
    """
    calls = {name: _calls(function, seconds) for name, function in sides.items()}
    found: dict[str, list[list[float]]] = {name: [] for name in sides}
    for done in range(blocks):
        for name in list(sides)[:: 1 if done % 2 else -1]:
            function, count = sides[name], calls[name]
            start = time.perf_counter()
            for _ in range(count):
                function()
            found[name].append([(time.perf_counter() - start) / count])
        heard()
    return found


def _calls(function: Callable[[], object], seconds: float) -> int:
    """How many calls fill a block, after a first one that does not count."""
    function()
    start = time.perf_counter()
    function()
    return max(1, min(_MOST_CALLS, round(seconds / max(time.perf_counter() - start, 1e-9))))
