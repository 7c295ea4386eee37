r"""What a curve of one stream's held-out losses says between the ends of its stages.

A curve is a list of steps, which never fall, and as many losses; between two measurements it is a straight line. The
steps are those of the whole line of stages, not of one. Measures of accuracy are turned round: a loss that rises is
forgetting, one that falls is learning.

**The stability gap** after a boundary (:func:`stability_gap`). With :math:`L_0` the loss at the boundary,

.. math:: d = \max_{p \le q} \bigl( L_p - \max(L_q, L_0) \bigr)

is its depth: the largest part of a rise above the loss at the boundary that the stream won back later in the stage.
:math:`B = \max(L_q, L_0)` is the level it came back to. A stream that only gets better has no gap; one that only gets
worse has forgotten, which is not a gap. The gap lasts from the boundary until, after its peak, nine tenths of the depth
are won back; its area is that between the curve and :math:`B` over that time.

**Worst case and windows** (:func:`worst_since`, :func:`windowed_forgetting`, :func:`windowed_plasticity`) are those of
De Lange, van de Ven and Tuytelaars 2022 (arXiv 2205.13452, section 3) for losses. Their windows count measurements,
one a step; here they count steps, since measurements are not evenly spaced.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

WON_BACK = 0.9  # of the depth: a loss that comes back ever more slowly would never be back


@dataclass(frozen=True)
class Gap:
    """What a boundary did to a stream, in the unit of the curve's losses; all nan if one of those is not finite.

    Attributes:
        before: loss at the boundary.
        rise: how far the loss rose above that at most, 0 if it never did.
        depth: the part of a rise that was won back; 0 for no gap.
        peak: steps from the boundary to the peak of the gap, 0 for no gap.
        duration: steps from the boundary until the gap was over, 0 for no gap.
        area: in the unit of the loss times steps, 0 for no gap.
        lasting: loss at the end of the curve minus that at the boundary: what is forgotten (or, below 0, gained).
    """

    before: float
    rise: float
    depth: float
    peak: float
    duration: float
    area: float
    lasting: float


def stability_gap(steps: Sequence[float], losses: Sequence[float]) -> Gap | None:
    """Return the gap of a curve that begins at a boundary; None where nothing was measured after it."""
    if len(steps) < 2:
        return None
    first, before = steps[0], losses[0]
    if not all(map(math.isfinite, losses)):
        return Gap(*[math.nan] * 7)
    rise, lasting = max(losses) - before, losses[-1] - before
    least = list(losses)  # of the losses from here on
    for i in range(len(least) - 2, -1, -1):
        least[i] = min(least[i], least[i + 1])
    depths = [loss - max(later, before) for loss, later in zip(losses, least, strict=True)]
    depth = max(depths)
    if depth <= 0:
        return Gap(before, rise, 0.0, 0.0, 0.0, 0.0, lasting)
    peak = depths.index(depth)
    level = max(least[peak], before)
    end = _falls_to(steps, losses, peak, level + (1 - WON_BACK) * depth)
    area = _area_above(level, steps, losses, end)
    return Gap(before, rise, depth, steps[peak] - first, end - first, area, lasting)


def worst_since(steps: Sequence[float], losses: Sequence[float], learned: float) -> tuple[float, float] | None:
    """Return the highest loss after step `learned` and its step; None if there was no measurement since.

    Its mean over all streams but the newest is to losses what min-ACC of the paper is to accuracies. A loss that is not
    a number counts as the highest.
    """
    later = [(loss, step) for step, loss in zip(steps, losses, strict=True) if step > learned]
    return max(later, key=lambda pair: (math.isnan(pair[0]), pair[0]), default=None)


def windowed_forgetting(steps: Sequence[float], losses: Sequence[float], window: float) -> float | None:
    """Return the largest rise of the loss within `window` steps (WF of the paper), at least 0.

    None if no two measurements lie in a window.
    """
    return _largest_rise(steps, losses, window)


def windowed_plasticity(steps: Sequence[float], losses: Sequence[float], window: float) -> float | None:
    """Return the largest fall of the loss within `window` steps (WP of the paper), at least 0; None as for a rise."""
    return _largest_rise(steps, [-loss for loss in losses], window)


def _largest_rise(steps: Sequence[float], losses: Sequence[float], window: float) -> float | None:
    """In one pass: `lows` holds the points of the window that may still be the lowest one, the lowest first."""
    lows: deque[tuple[float, float]] = deque()
    largest = None
    for step, loss in zip(steps, losses, strict=True):
        if not math.isfinite(loss):
            return math.nan
        while lows and step - lows[0][0] > window:
            lows.popleft()
        if lows:
            largest = max(largest or 0.0, loss - lows[0][1])
        while lows and lows[-1][1] >= loss:
            lows.pop()
        lows.append((step, loss))
    return largest


def _falls_to(steps: Sequence[float], losses: Sequence[float], peak: int, level: float) -> float:
    """The step after measurement `peak` at which the curve is down at `level`, which it reaches."""
    i = next(i for i in range(peak + 1, len(losses)) if losses[i] <= level)
    part = (losses[i - 1] - level) / (losses[i - 1] - losses[i])
    return steps[i - 1] + part * (steps[i] - steps[i - 1])


def _area_above(level: float, steps: Sequence[float], losses: Sequence[float], end: float) -> float:
    """The area between the curve and `level` where the curve is above it, up to step `end`."""
    area = 0.0
    for (x, a), (y, b) in pairwise((s, loss - level) for s, loss in zip(steps, losses, strict=True)):
        if x >= end:
            break
        stop = min(y, end)
        last = b if y <= end else a + (b - a) * (end - x) / (y - x)
        if a >= 0 and last >= 0:
            area += (a + last) / 2 * (stop - x)
        elif max(a, last) > 0:  # a triangle: the line crosses the level
            area += max(a, last) ** 2 / (2 * abs(last - a)) * (stop - x)
    return area
