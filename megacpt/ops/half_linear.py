"""The product of float32 activations with a matrix of 16-bit floats, for output heads in inference.

A head is a large matrix that few tokens meet: reading its weights is all the time there is. The kernel reads them as
they are stored; torch would want the activations in 16 bits too. On CUDA they are: there torch's own product reads no
more than this one, and there is no kernel.

Shapes: T tokens, i features in, o features out.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megacpt.ops import packed_linear_cpu, packed_linear_reference
from megacpt.ops.dispatch import FusedOp, Kernel

_HALVES = frozenset({torch.bfloat16, torch.float16})


class Functions(Protocol):
    """What an implementation offers; see `half_linear` for the meaning."""

    def half_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product."""
        ...


def _compiled() -> Functions:
    return packed_linear_cpu.load()


HALF_LINEAR: FusedOp[Functions] = FusedOp(
    "half linear",
    reference=packed_linear_reference,
    fallback_cost="which copies the whole matrix to float32 for every product",
    kernels=(Kernel("cpu", _HALVES, _compiled),),
)


def half_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply float32 activations by a matrix of 16-bit weights, accumulated in float32; not differentiable.

    Args:
        x: [T, i] float32.
        weight: [o, i] bfloat16 or float16.

    Returns:
        [T, o] float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a gradient would be needed.
    """
    if weight.dim() != 2 or weight.dtype not in _HALVES:
        raise ValueError(f"weight must be [o, i] bfloat16 or float16, not {list(weight.shape)} {weight.dtype}")
    if x.dim() != 2 or x.shape[1] != weight.shape[1] or x.dtype is not torch.float32:
        raise ValueError(f"x must be [T, {weight.shape[1]}] float32, not {list(x.shape)} {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and the weight on {weight.device}; they must be on one device")
    if (x.requires_grad or weight.requires_grad) and torch.is_grad_enabled():
        raise ValueError("half_linear has no gradient and x or weight requires one: run under torch.no_grad()")
    return HALF_LINEAR.choose(x.device.type, weight.dtype).functions.half_linear(x, weight)
