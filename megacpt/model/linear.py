"""Megatron's tensor-parallel linear layers, with a short way for ranks that have no tensor-parallel peers.

Megatron runs every projection through an autograd function written in Python, which also joins the shards. Where one
rank holds the whole matrix there is nothing to join: torch's own linear does the same multiplications without the
detour (measured on the CPU: 10-20 % of a step of a small model).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor

Output = tuple[Tensor, Tensor | None]


class ColumnLinear(tensor_parallel.ColumnParallelLinear):
    """A linear layer whose rows of the weight (columns of the output) are spread over the tensor-parallel ranks."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> Output:
        """Project [s, b, h]; return the output, and the bias where the caller is to add it."""
        if self.tp_group.size() > 1:
            joined: Output = super().forward(input_, weight, runtime_gather_output)
            return joined
        return local_linear(self, input_, self.weight if weight is None else weight)


class RowLinear(tensor_parallel.RowParallelLinear):
    """A linear layer whose columns of the weight are spread over the tensor-parallel ranks; the outputs are summed."""

    def forward(self, input_: Tensor) -> Output:
        """Project [s, b, h / tp]; return the output, and the bias where the caller is to add it."""
        if self.tp_group.size() > 1:
            joined: Output = super().forward(input_)
            return joined
        return local_linear(self, input_, self.weight)

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Any:
        # Megatron names no group here, and then warns, formatting the warning, at every call.
        return super()._forward_impl(input, weight, **{**options, "tp_group": self.tp_group})


def local_linear(layer: Any, x: Tensor, weight: Tensor) -> Output:
    """Multiply [s, b, i] with a weight [o, i] that is whole on this rank, under the bias of a layer of Megatron's."""
    if layer.skip_bias_add:
        return F.linear(x, weight), layer.bias
    return F.linear(x, weight, layer.bias), None
