"""Activations rounded token by token, with the gradient passing straight through.

Shapes: [.., h], a token in each row. Where tensor parallelism spreads h over ranks, the largest value is that of the
whole row, so that the function does not depend on the layout.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Activations = Literal["none", "int8", "fp8"]
EPSILON = 1e-5  # of BitNet b1.58: rows that are smaller are rounded as if they were this large
_INT8, _FP8 = 127, torch.finfo(torch.float8_e4m3fn).max


def round_tokens(x: Tensor, form: Activations, group: dist.ProcessGroup | None = None) -> Tensor:
    """Round each row to the levels of the form, scaled by its largest absolute value.

    Args:
        x: [.., h], this rank's columns.
        form: ``int8``: round(x / s) * s with s = largest / 127, as BitNet b1.58 (arXiv 2402.17764); ``fp8``: float8
            e4m3 of x / s with s = largest / 448; ``none``: x itself.
        group: the ranks that hold the other columns; None where there are none.

    Returns:
        [.., h] in the dtype of x; its gradient is that of x.
    """
    if form == "none":
        return x
    out: Tensor = _Rounded.apply(x, form, group)
    return out


class _Rounded(torch.autograd.Function):
    """Rounding whose gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Activations, group: dist.ProcessGroup | None) -> Tensor:
        """[.., h] to [.., h]."""
        del ctx
        largest = x.abs().amax(-1, keepdim=True)
        if group is not None and group.size() > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        working = torch.promote_types(x.dtype, torch.float32)
        scale = largest.to(working).clamp_(min=EPSILON) / (_INT8 if form == "int8" else _FP8)
        steps = x / scale
        codes = steps.round_() if form == "int8" else steps.clamp_(-_FP8, _FP8).to(torch.float8_e4m3fn)
        return (codes.to(working) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """[.., h] to [.., h]."""
        del ctx
        return grad, None, None
