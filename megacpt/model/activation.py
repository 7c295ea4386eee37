"""The activation of the MLP, as Megatron's `MLP` builds it from a layer spec."""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

ACTIVATIONS = {"swiglu": F.silu, "geglu": F.gelu, "relu2glu": squared_relu, "gelu": F.gelu}
"""The functions by `model.activation`."""


class Activation:
    """The configured function; with a gate, on the first half of the features, times the second half.

    Megatron's own gated path shifts the second half by an offset that is zero here, a pass over the largest
    activation of the layer.

    Args:
        config: Megatron's configuration of the model.
    """

    def __init__(self, config: TransformerConfig) -> None:
        self.function = config.activation_func
        self.gated = config.gated_linear_unit

    def __call__(self, x: Tensor) -> Tensor:
        """[..., 2f] to [..., f] with a gate, else [..., f] to [..., f]."""
        if not self.gated:
            return self.function(x)  # type: ignore[no-any-return]
        gate, up = x.chunk(2, -1)
        return self.function(gate) * up  # type: ignore[no-any-return]
