"""Rotary positions: the sines and cosines of a model, made once for as many positions as it will read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megacpt.model.rope import attention_factor, scale_frequencies

if TYPE_CHECKING:
    from megacpt.config import ModelConfig


class Rotary:
    """Rotates the first dims of queries and keys by their position (Su et al. 2021, arXiv 2104.09864, eq. 34).

    Dim j turns with dim j + r/2 of the r that are rotated, as in GPT-NeoX and Hugging Face's Llama.

    Args:
        model: gives base, share and scaling.
        positions: how many are made.
        device: where.

    Attributes:
        cosines: [positions, r] float32, times the factor of the scaling.
        sines: the same; those of the first half negative, so that one multiplication does.
    """

    def __init__(self, model: ModelConfig, positions: int, device: torch.device) -> None:
        self.dims = model.rotary_dim
        steps = torch.arange(0, self.dims, 2, dtype=torch.float32) / self.dims
        frequencies = scale_frequencies(1.0 / model.rope.base**steps, model.rope)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
        factor = attention_factor(model.rope.scaling)
        self.cosines = (factor * torch.cat((angles.cos(), angles.cos()), 1)).to(device)
        self.sines = (factor * torch.cat((-angles.sin(), angles.sin()), 1)).to(device)

    def __call__(self, x: Tensor, start: int) -> Tensor:
        """Rotate [T, heads, d], whose first row stands at position `start`, in float32; of the dtype of x."""
        end = start + x.shape[0]
        cosines, sines = self.cosines[start:end, None], self.sines[start:end, None]
        turned = x[..., : self.dims]
        first, second = turned.chunk(2, -1)
        rotated = (turned * cosines + torch.cat((second, first), -1) * sines).to(x.dtype)
        return rotated if self.dims == x.shape[-1] else torch.cat((rotated, x[..., self.dims :]), -1)
