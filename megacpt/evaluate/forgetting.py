r"""How much of each stream a lineage learned, and how much it forgot later.

Everything follows from the matrix :math:`L_{i,s}`: bits a byte on held-out text of stream :math:`s` after stage
:math:`i`, the stages counted from 0. The *home* :math:`h_s` is the first stage that trained on stream :math:`s`.
For a loss lower is better, so the signs are those of the sources turned round:

- forgetting, :math:`F_{i,s} = L_{i,s} - \min_{h_s \le l < i} L_{l,s}` for :math:`i > h_s`: how much worse the stream
  is than it was at the end of the best stage before (Chaudhry et al. 2018, arXiv 1801.10112, eq. 3);
- change, :math:`C_{i,s} = L_{i,s} - L_{h_s,s}` for :math:`i > h_s`: how much worse than at the end of its own stage;
- average and maximum forgetting after stage :math:`i`: those of :math:`F_{i,s}` over all :math:`s` with
  :math:`h_s < i`;
- average loss after stage :math:`i`: the mean of :math:`L_{i,s}` over all :math:`s` with :math:`h_s \le i`;
- learned: :math:`L_{h_s-1,s} - L_{h_s,s}`, what the own stage of a stream gained on it;
- forward transfer: the mean of :math:`b_s - L_{h_s-1,s}` over all :math:`s` with :math:`h_s > 0`, where :math:`b_s` is
  the loss before the first stage; positive where earlier stages helped a stream before its own (Lopez-Paz and Ranzato
  2017, arXiv 1706.08840, eq. 4);
- backward transfer after the last stage :math:`T`: :math:`-\operatorname{mean}_s C_{T,s}` over all :math:`s` with
  :math:`h_s < T`; positive where later stages helped (the same, eq. 3).

Forgetting is negative where a later stage made a stream better than it ever was. What happens between the ends of the
stages is in :mod:`megacpt.evaluate.curves`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

Losses = Sequence[Mapping[str, float]]
"""Row i: bits a byte by stream after stage i. A stream that was not measured then is left out."""


def forgetting(losses: Losses, homes: Mapping[str, int]) -> list[dict[str, float]]:
    """Return :math:`F_{i,s}` in bits a byte, a row a stage; streams at home in this or a later stage have none.

    Args:
        losses: the matrix, a row a stage.
        homes: the stage in which each stream was first trained on; other streams cannot be forgotten.
    """
    rows: list[dict[str, float]] = []
    for i, row in enumerate(losses):
        found = {}
        for stream in _older(row, homes, i):
            earlier = _measured(losses[homes[stream] : i], stream)
            if earlier:
                found[stream] = row[stream] - _least(earlier)
        rows.append(found)
    return rows


def change(losses: Losses, homes: Mapping[str, int]) -> list[dict[str, float]]:
    """Return :math:`C_{i,s}` in bits a byte, a row a stage, for the streams measured at the end of their own stage.

    Args:
        losses: the matrix, a row a stage.
        homes: the stage in which each stream was first trained on.
    """
    return [
        {s: row[s] - losses[homes[s]][s] for s in _older(row, homes, i) if s in losses[homes[s]]}
        for i, row in enumerate(losses)
    ]


def average(row: Mapping[str, float]) -> float | None:
    """Return the mean over the streams of a row, or None where it is empty."""
    return sum(row.values()) / len(row) if row else None


def maximum(row: Mapping[str, float]) -> tuple[str, float] | None:
    """Return the stream with the largest value of a row and that value, or None where it is empty.

    A value that is not a number counts as the largest.
    """
    return max(row.items(), key=lambda item: (math.isnan(item[1]), item[1]), default=None)


def average_loss(losses: Losses, homes: Mapping[str, int]) -> list[float | None]:
    """Return after each stage the mean loss, in bits a byte, over the streams that were trained on up to then."""
    return [average({s: row[s] for s in row if homes.get(s, len(losses)) <= i}) for i, row in enumerate(losses)]


def learned(losses: Losses, homes: Mapping[str, int], start: Mapping[str, float]) -> dict[str, float]:
    """Return what each stream gained in its own stage, in bits a byte, where it was measured before and after it.

    Args:
        losses: the matrix, a row a stage.
        homes: the stage in which each stream was first trained on.
        start: losses before the first stage.
    """
    before = _before_own(losses, homes, start)
    return {s: before[s] - losses[home][s] for s, home in homes.items() if s in before and s in losses[home]}


def forward_transfer(losses: Losses, homes: Mapping[str, int], start: Mapping[str, float]) -> dict[str, float]:
    """Return how much better each stream was before its own stage than at the start, in bits a byte.

    Streams of the first stage have none. Arguments as for `learned`.
    """
    before = _before_own(losses, homes, start)
    return {s: start[s] - before[s] for s, home in homes.items() if home > 0 and s in start and s in before}


def backward_transfer(losses: Losses, homes: Mapping[str, int]) -> float | None:
    """Return the backward transfer after the last stage in bits a byte, or None where no stream is older than it."""
    mean = average(change(losses, homes)[-1]) if losses else None
    return None if mean is None else -mean


def _before_own(losses: Losses, homes: Mapping[str, int], start: Mapping[str, float]) -> dict[str, float]:
    rows = {s: losses[home - 1] if home else start for s, home in homes.items()}
    return {s: row[s] for s, row in rows.items() if s in row}


def _older(row: Mapping[str, float], homes: Mapping[str, int], stage: int) -> Iterable[str]:
    return [stream for stream in row if homes.get(stream, stage) < stage]


def _measured(rows: Losses, stream: str) -> list[float]:
    return [row[stream] for row in rows if stream in row]


def _least(values: Sequence[float]) -> float:
    """The minimum; a loss that is not a number makes it one that is not either, wherever it stands."""
    return math.nan if any(map(math.isnan, values)) else min(values)
