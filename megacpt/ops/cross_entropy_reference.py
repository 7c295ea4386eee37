"""The definition of the vocabulary-parallel cross entropy, in torch: any device, float64 included.

Shapes: N tokens, V columns of this rank's shard of the vocabulary. Arithmetic is float32, or float64 for float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 1 << 24  # elements that are widened at a time, so that the temporaries stay small beside the logits


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK // max(1, logits.shape[1]))
    return (slice(start, start + rows) for start in range(0, logits.shape[0], rows))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and of sums for logits of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _column(target: Tensor, vocab_start: int, width: int) -> tuple[Tensor, Tensor]:
    """The targets' columns in this shard, clamped into it, and which of them really lie in it; [N] each."""
    column = target - vocab_start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def partials(logits: Tensor, target: Tensor, vocab_start: int) -> tuple[Tensor, Tensor, Tensor]:
    """What this shard contributes to the loss of each token.

    Args:
        logits: [N, V], this shard.
        target: [N] int64, ids of the whole vocabulary.
        vocab_start: id of the shard's first column.

    Returns:
        [N] each: the largest logit m, the sum of exp(logit - m), and the target's logit, 0 if in another shard.
    """
    dtype = accumulation_dtype(logits.dtype)
    row_max, sum_exp, target_logit = (logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(3))
    for rows in _blocks(logits):
        x = logits[rows].to(dtype)
        top = x.amax(1)
        row_max[rows] = top
        # A shard may be -inf all over while another is not; it then contributes nothing.
        sum_exp[rows] = (x - top.masked_fill(top == -torch.inf, 0)[:, None]).exp_().sum(1)
        column, here = _column(target[rows], vocab_start, x.shape[1])
        target_logit[rows] = x.gather(1, column[:, None])[:, 0].masked_fill(~here, 0)
    return row_max, sum_exp, target_logit


def gradient(
    logits: Tensor,
    target: Tensor,
    row_max: Tensor,
    sum_exp: Tensor,
    grad_loss: Tensor,
    vocab_start: int,
    out: Tensor,
) -> None:
    """Write the gradient of the loss by this shard's logits, (softmax - onehot) * grad_loss, into `out`.

    Args:
        logits: [N, V], this shard.
        target: [N] int64, ids of the whole vocabulary.
        row_max: [N], the largest logit over all shards.
        sum_exp: [N], the sum of exp(logit - row_max) over all shards.
        grad_loss: [N], the gradient of each token's loss.
        vocab_start: id of the shard's first column.
        out: [N, V], of the dtype of `logits`; may be `logits`.
    """
    dtype = accumulation_dtype(logits.dtype)
    for rows in _blocks(logits):
        x = logits[rows].to(dtype) - row_max[rows, None]
        x.exp_().mul_((grad_loss[rows] / sum_exp[rows])[:, None])
        column, here = _column(target[rows], vocab_start, x.shape[1])
        x.scatter_add_(1, column[:, None], -grad_loss[rows].masked_fill(~here, 0)[:, None])
        out[rows] = x
