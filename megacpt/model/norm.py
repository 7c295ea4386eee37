"""Norms with Megatron's signature, carrying the mark that sequence parallelism needs."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, ``y = x / sqrt(mean(x^2) + eps) * weight``.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.

    The weight is replicated over the tensor-parallel ranks. Under sequence parallelism each of them sees a part
    of the sequence, so its gradient has to be summed over them: Megatron does that for parameters that are
    marked ``sequence_parallel``.

    Args:
        config: Megatron's configuration of the model.
        hidden_size: size of the last dim of the input.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim of `x`, whatever the others are."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer normalisation, ``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias``.

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization". Marked as the weight of `RMSNorm` is.

    Args:
        config: Megatron's configuration of the model.
        hidden_size: size of the last dim of the input.
        eps: added to the variance.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim of `x`, whatever the others are."""
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
"""The norms of the residual stream by `model.norm`."""
