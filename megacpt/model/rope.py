"""Scaling of rotary frequencies for longer contexts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megacpt.config import RopeScaling


def scale_frequencies(inv_freq: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Scale the rotary frequencies of a model for a context longer than it was trained on.

    ``linear`` divides all of them by the factor (position interpolation, Chen et al. 2023). ``llama3`` keeps those
    that turn at least `high_freq_factor` times within the original length, divides those that turn at most
    `low_freq_factor` times, and blends in between (Llama 3 report, section 3.4.1).

    Args:
        inv_freq: [d/2], radians a position.
        scaling: the configuration; None leaves them as they are.

    Returns:
        [d/2], radians a position.
    """
    if scaling is None:
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    turns = scaling.original_length * inv_freq / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = blend.clamp(0.0, 1.0)
    return torch.lerp(inv_freq / scaling.factor, inv_freq, kept)
