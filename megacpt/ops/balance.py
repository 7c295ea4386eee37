r"""The losses that balance experts: one convention, whatever the layout, accumulation or padding.

With :math:`n_e` assignments of expert e among the k T assignments of T tokens, and :math:`P_{te}` the routing
probability of token t for expert e,

.. math::

    \text{aux} = \alpha \, E \sum_e f_e \, \bar P_e, \qquad f_e = \frac{n_e}{k T}, \quad
    \bar P_e = \frac 1 T \sum_t P_{te}, \qquad \text{z} = \frac{\beta}{T} \sum_t \mathrm{lse}_t^2

(Fedus et al. 2021, arXiv 2101.03961, eq. 4, with f divided by k so that aux is :math:`\alpha` at uniform routing for
any k; Zoph et al. 2022, arXiv 2202.08906, eq. 5). Both are means over tokens. The loss of a step is a sum over tokens
that is divided by their global number, so each token simply adds :math:`\alpha E \sum_e f_e P_{te} +
\beta\,\mathrm{lse}_t^2`: the strength cannot depend on how tokens are spread over ranks, microbatches or sequences.
Only the *scope* of :math:`f_e`, over which tokens are counted, is a choice (Qiu et al. 2025, arXiv 2501.11873).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megacpt.ops.router_reference import PROBABILITY_ONE, Z_ONE


def assignments(counts: Tensor) -> Tensor:
    """The fraction of all assignments that each expert has, f; [E] float64, 0 where there are none at all.

    Args:
        counts: [E] int64, over the scope.
    """
    total = counts.sum()
    return counts.double() / total.clamp(min=1)


def balance_coefficients(fractions: Tensor, alpha: float) -> Tensor:
    """What each routing probability adds to the loss of its token, [E] float32.

    Args:
        fractions: [E], f of `assignments`.
        alpha: strength of the aux loss.
    """
    return (alpha * fractions.numel() * fractions).float()


def balance_loss(fractions: Tensor, prob_sum: Tensor, tokens: int, alpha: float) -> Tensor:
    """The value of the aux loss, a mean over tokens; float64.

    Args:
        fractions: [E], f of `assignments`.
        prob_sum: [E] int64 in fixed point, over the tokens whose loss is wanted.
        tokens: their number.
        alpha: strength of the aux loss.
    """
    mean = prob_sum.double() / PROBABILITY_ONE / max(tokens, 1)
    return alpha * fractions.numel() * torch.dot(fractions.double(), mean)


def z_loss(z_sum: Tensor, tokens: int, beta: float) -> Tensor:
    """The value of the z-loss, a mean over tokens; float64.

    Args:
        z_sum: [1] int64 in fixed point.
        tokens: their number.
        beta: strength of the z-loss.
    """
    return beta * z_sum.double().sum() / Z_ONE / max(tokens, 1)
