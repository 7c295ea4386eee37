"""The product with a packed ternary matrix, for inference: 2 bits a weight are all that is read of it.

`packed_linear_reference` says what is computed, and how the activations may be rounded to 8 bits so that the products
are of integers; `packed_matrix` says how the weights lie in memory.

Shapes: T tokens, i columns of the matrix (features in), o rows (features out), C column blocks with their own scales.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megacpt.ops import packed_linear_cpu, packed_linear_cuda, packed_linear_reference
from megacpt.ops.dispatch import FusedOp, Kernel
from megacpt.ops.packed_linear_reference import Activations
from megacpt.ops.packed_matrix import PackedMatrix, pack_matrix
from megacpt.ops.tensors import FORMATS

__all__ = ["PACKED_LINEAR", "Activations", "PackedMatrix", "pack_matrix", "packed_linear"]


class Functions(Protocol):
    """What an implementation offers; see `packed_linear_reference` for the meaning."""

    def packed_linear(self, x: Tensor, matrix: PackedMatrix, activations: Activations) -> Tensor:
        """The product."""
        ...


def _compiled() -> Functions:
    return packed_linear_cpu.load()


PACKED_LINEAR: FusedOp[Functions] = FusedOp(
    "packed linear",
    reference=packed_linear_reference,
    fallback_cost="which unpacks the whole matrix for every product",
    kernels=(
        Kernel("cpu", frozenset(FORMATS), _compiled),
        Kernel("cuda", frozenset((torch.bfloat16,)), packed_linear_cuda.load),
    ),
)


def packed_linear(x: Tensor, matrix: PackedMatrix, activations: Activations = "float") -> Tensor:
    """Multiply by a packed ternary matrix; for inference alone, not differentiable.

    Args:
        x: [T, i]; float32, bfloat16, float16 or float64.
        matrix: of `pack_matrix`, [o, i].
        activations: "float" multiplies x as it is; "int8" rounds it to 8 bits first, by blocks of 256 columns, which
            is faster for few tokens on the CPU; "fp8" rounds each token to float8 e4m3 first, as training does.

    Returns:
        [T, o], of the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a gradient would be needed.
    """
    if x.dim() != 2 or x.shape[1] != matrix.i or not x.is_floating_point():
        raise ValueError(f"x must be [T, {matrix.i}] and floating point, not {list(x.shape)} {x.dtype}")
    if x.device != matrix.device:
        raise ValueError(f"x is on {x.device} and the matrix on {matrix.device}; they must be on one device")
    if activations not in ("float", "int8", "fp8"):
        raise ValueError(f"activations must be 'float', 'int8' or 'fp8', not {activations!r}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "packed_linear has no gradient and x requires one: run under torch.no_grad(), or train the latent weights"
        )
    return PACKED_LINEAR.choose(x.device.type, x.dtype).functions.packed_linear(x, matrix, activations)
