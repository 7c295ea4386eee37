"""Tensors as the compiled kernels take them: where they lie, and the number of their format."""

from __future__ import annotations

import torch
from torch import Tensor

# As `kernels/cpu/formats.h` and `kernels/cuda/numbers.cuh` number them.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def address(tensor: Tensor | None) -> int | None:
    """Where the numbers of a tensor begin; None, which C reads as a null pointer, for none."""
    return None if tensor is None else tensor.data_ptr()
