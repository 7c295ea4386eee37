"""Scaling of rotary frequencies for longer contexts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megacpt.config import RopeConfig, RopeScaling, YarnScaling


def scale_frequencies(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    """Scale the rotary frequencies of a model for a context longer than it was trained on.

    ``linear`` divides all of them by the factor (position interpolation, Chen et al. 2023). ``llama3`` keeps those
    that turn at least `high_freq_factor` times within the original length, divides those that turn at most
    `low_freq_factor` times, and blends in between (Llama 3 report, section 3.4.1). ``yarn`` blends between
    `beta_fast` and `beta_slow` turns, evenly over the dims (Peng et al. 2023, section 3.2).

    Args:
        inv_freq: [d/2], radians a position.
        rope: base and scaling; without scaling they stay as they are.

    Returns:
        [d/2], radians a position.
    """
    scaling = rope.scaling
    if scaling is None:
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    if scaling.kind == "yarn":
        return torch.lerp(inv_freq, inv_freq / scaling.factor, _stretched(inv_freq, rope.base, scaling))
    turns = scaling.original_length * inv_freq / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = blend.clamp(0.0, 1.0)
    return torch.lerp(inv_freq / scaling.factor, inv_freq, kept)


def _stretched(inv_freq: Tensor, base: float, scaling: YarnScaling) -> Tensor:
    """How far each frequency is stretched, [d/2] from 0 to 1; the ends of the ramp are whole dims."""
    half = inv_freq.numel()

    def place(turns: float) -> float:
        """Where in [0, d/2] the frequency is that turns so often within the original length."""
        return half * math.log(scaling.original_length / (turns * 2 * math.pi)) / math.log(base)

    first = max(math.floor(place(scaling.beta_fast)), 0)
    last = min(math.ceil(place(scaling.beta_slow)), 2 * half - 1)
    steps = torch.arange(half, dtype=inv_freq.dtype, device=inv_freq.device) - first
    return (steps / max(last - first, 1e-3)).clamp(0.0, 1.0)


def attention_factor(scaling: RopeScaling | None) -> float:
    """The factor on rotated queries and keys; that of `yarn` is the square root of 1/t (section 3.3)."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return _sharpening(scaling.factor, scaling.mscale) / _sharpening(scaling.factor, scaling.mscale_all_dim)


def _sharpening(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0
