"""Linear layers of a model that is only run: packed, in half precision, or dense.

Each takes [T, i] and gives [T, o], in float32 on the CPU and in bfloat16 on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megacpt.ops.half_linear import half_linear
from megacpt.ops.packed_linear import Activations, PackedMatrix, pack_matrix, packed_linear
from megacpt.quant.matrix import Quantised

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PackedLinear:
    """Codes of two bits and their scales, multiplied without being unpacked.

    Attributes:
        matrix: the kernel's form of the matrix.
        activations: whether `x` is multiplied as it is or rounded first.
        bias: [o] of the dtype of `x`, if there is one.
    """

    matrix: PackedMatrix
    activations: Activations
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply."""
        y = packed_linear(x, self.matrix, self.activations)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class HalfLinear:
    """A matrix in bfloat16 or float16, for activations in float32.

    Attributes:
        weight: [o, i].
        bias: [o], if there is one.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply."""
        y = half_linear(x, self.weight)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class DenseLinear:
    """A matrix in the dtype of its activations, for torch's own product.

    Attributes:
        weight: [o, i].
        bias: [o], if there is one.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply."""
        return F.linear(x, self.weight, self.bias)


Linear = PackedLinear | HalfLinear | DenseLinear


def dense_linear(weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Linear:
    """The layer of a matrix that was not quantised, for activations of `dtype`.

    For float32 it stays in 16 bits if it is stored so. For bfloat16 torch's own product reads no more than 16 bits a
    weight, and there is no other kernel.
    """
    if dtype is torch.float32 and weight.dtype in HALF:
        return HalfLinear(weight, bias)
    return DenseLinear(weight.to(dtype), bias)


def quantised_linear(
    parts: Sequence[Quantised],
    activations: Activations,
    device: torch.device,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Linear:
    """One layer of quantised matrices below each other, for activations of `dtype`: their outputs side by side.

    Codes of more than two bits, and those behind a transform, have no packed product and become dense.
    """
    if any(part.transform != 1 or int(part.codes.abs().max()) > 1 for part in parts):
        return DenseLinear(torch.cat([part.dense(dtype) for part in parts]).to(device), bias)
    codes = torch.cat([part.codes for part in parts])
    scales = torch.cat([part.scales.repeat_interleave(len(part.codes) // len(part.scales), 0) for part in parts])
    return PackedLinear(pack_matrix(codes.to(device), scales.to(device)), activations, bias)
