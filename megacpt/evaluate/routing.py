r"""How a layer of experts routes: the load of its experts, how even it is, how it changes, what it tells of the data.

A layer has :math:`E` experts and sends each of :math:`N` tokens to :math:`k` of them; :math:`I(x)` are those that token
:math:`x` went to, :math:`n_i` is the number of tokens that expert :math:`i` got. In code the choices of a layer are an
array [N, k] of expert numbers, in any order, -1 where a choice was dropped because its expert was full.

- *Load*, :math:`n_i / \sum_j n_j`, of an expert.
- *Maximum routing imbalance* of a batch :math:`B` of tokens, :math:`\mathrm{MRI} = \max_i \frac{1}{|B|} \sum_{x \in B}
  [i \in I(x)]`: the share of the tokens that the busiest expert got. Even is :math:`k/E`, the worst is 1. Over several
  batches it is their median (Therien et al. 2025, arXiv 2503.05029). It depends on the size of the batch: of few tokens
  some expert always gets many.
- *Load entropy*, :math:`-\sum_i l_i \log l_i / \log E` of the loads :math:`l`: 1 is even, 0 is a single expert.
- *Router saturation* between two sets of choices of the same tokens, :math:`\frac{1}{N} \sum_x |I(x) \cap I'(x)| / k`
  (Muennighoff et al. 2024, arXiv 2409.02060, section 5.1): the share of the choices that are still the same. Against
  the choices before a distribution shift it is the *continual* router saturation of Therien et al.
- *Expert-domain information*, :math:`I(i; s) = \sum_{s,i} w_s l_{s,i} \log_2 \frac{l_{s,i}}{\sum_t w_t l_{t,i}}` for
  loads :math:`l_s` on stream :math:`s` of weight :math:`w_s`: how many bits one choice of a token tells of its stream.
- *Vocabulary specialisation* of expert :math:`i` on token id :math:`v`, :math:`n_{v,i} / n_v`: the share of the tokens
  with that id that went to it (Muennighoff et al., section 5.4).
- *Co-activation* of expert :math:`j` with :math:`i`, :math:`n_{ij} / n_i`: the share of the tokens of :math:`i` that
  went to :math:`j` too (the same, section 5.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Experts = NDArray[np.integer]
"""[N, k]: the choices of one layer."""
Numbers = NDArray[np.float64]


def counts(experts: Experts, total: int) -> NDArray[np.int64]:
    """Return how many tokens each expert got, [E]; dropped choices count for none.

    Args:
        experts: [N, k].
        total: the number of experts, E.
    """
    return np.bincount(experts[experts >= 0].astype(np.int64), minlength=total)


def loads(experts: Experts, total: int) -> Numbers:
    """Return the share of the choices that each expert got, [E]; all 0 where every choice was dropped."""
    found = counts(experts, total)
    return found / max(int(found.sum()), 1)


def max_load(experts: Experts, total: int, batch: int) -> float:
    """Return the maximum routing imbalance, the median over batches; nan without tokens.

    Args:
        experts: [N, k].
        total: the number of experts.
        batch: tokens of a batch at least; the tokens are cut into as many batches as possible, in their order.
    """
    if not len(experts):
        return float("nan")
    batches = np.array_split(experts, max(1, len(experts) // batch))
    return float(np.median([counts(part, total).max() / len(part) for part in batches]))


def load_entropy(experts: Experts, total: int) -> float:
    """Return the entropy of the loads as a share of the largest possible; 1 for one expert, nan without choices."""
    found = loads(experts, total)
    if not found.any():
        return float("nan")
    return _bits(found) / np.log2(total) if total > 1 else 1.0


def dropped(experts: Experts) -> float:
    """Return the share of the choices that were dropped; 0 without choices."""
    return float(np.mean(experts < 0)) if experts.size else 0.0


def saturation(before: Experts, after: Experts) -> float:
    """Return the router saturation between two sets of choices of the same tokens; nan without choices.

    A dropped choice is none: where some were dropped, the larger number that was kept stands in the place of k, so that
    choices are always the same as themselves; tokens that lost all choices both times do not count.

    Args:
        before: [N, k].
        after: [N, k], of the same tokens in the same order.
    """
    same = (before[:, :, None] == after[:, None, :]) & (before >= 0)[:, :, None]
    kept = np.maximum((before >= 0).sum(1), (after >= 0).sum(1))
    shares = same.sum((1, 2))[kept > 0] / kept[kept > 0]
    return float(shares.mean()) if len(shares) else float("nan")


def information(by_stream: Numbers, weights: Sequence[float] | None = None) -> tuple[float, float]:
    """Return the expert-domain information in bits, and as a share of the entropy of the streams (0 for one stream).

    A finite sample makes it too large by about (S - 1)(E - 1) / (2 ln 2 n) bits for n choices in all (Miller 1955).

    Args:
        by_stream: [S, E], the loads on each stream, each row with the sum 1.
        weights: of the streams, [S]; equal if None.
    """
    share = np.ones(len(by_stream)) if weights is None else np.asarray(weights, dtype=np.float64)
    share = share / share.sum()
    inside = sum(part * _bits(row) for part, row in zip(share, by_stream, strict=True))
    bits = max(_bits(share @ by_stream) - inside, 0.0)  # H(i) - H(i | s); rounding may make it negative
    return bits, bits / _bits(share) if len(share) > 1 else 0.0


def vocabulary_specialisation(experts: Experts, ids: NDArray[np.integer], total: int) -> tuple[Numbers, float]:
    r"""Return how much each expert owns the token ids that it gets, [E], and the mean over all choices.

    For expert :math:`i` it is the mean of :math:`(n_{v,i} - 1) / (n_v - 1)` over its tokens, :math:`v` their ids: of
    the *other* tokens with the same id, the share that went to it too. Without the tokens themselves it is no larger
    for ids that are rare, and :math:`n_i / N` for an expert that does not look at ids; 1 is an expert that gets
    every token of its ids. Ids with a single token say nothing. nan where no token says anything.

    Args:
        experts: [N, k].
        ids: [N], the tokens that were routed (those the model read, not those it had to predict).
        total: the number of experts.
    """
    _, place, of_id = np.unique(ids, return_inverse=True, return_counts=True)
    kept = (experts >= 0) & (of_id[place] > 1)[:, None]
    row = np.broadcast_to(place.reshape(-1, 1), experts.shape)[kept]
    pairs, of_pair = np.unique(row * total + experts[kept].astype(np.int64), return_counts=True)
    expert, owned = pairs % total, of_pair * (of_pair - 1) / (of_id[pairs // total] - 1)
    tokens = np.bincount(expert, of_pair, total)
    with np.errstate(invalid="ignore"):
        by_expert = np.bincount(expert, owned, total) / np.where(tokens > 0, tokens, np.nan)
    return by_expert, float(owned.sum() / tokens.sum()) if len(pairs) else float("nan")


def co_activation(experts: Experts, total: int) -> Numbers:
    """Return the co-activation of each expert (column) with each other one (row), [E, E].

    The diagonal is 1; rows of experts without tokens are 0.
    """
    chosen = np.zeros((len(experts), total + 1))  # the last column takes what was dropped
    np.put_along_axis(chosen, experts.astype(np.int64) % (total + 1), 1.0, axis=1)
    together = chosen[:, :total].T @ chosen[:, :total]
    return np.asarray(together / np.maximum(together.diagonal(), 1)[:, None])


def partnership(experts: Experts, total: int) -> float:
    """Return the mean over the choices of the co-activation of their expert's most frequent partner.

    1 where experts go in fixed groups, (k - 1) / (E - 1) where all partners are as frequent, 0 for k = 1; nan without
    choices.
    """
    matrix = co_activation(experts, total)
    np.fill_diagonal(matrix, 0.0)
    share = loads(experts, total)
    return float(share @ matrix.max(axis=1)) if share.any() else float("nan")


def _bits(shares: Numbers) -> float:
    """The entropy of shares whose sum is 1, in bits."""
    positive = shares[shares > 0]
    return float(-(positive * np.log2(positive)).sum())
