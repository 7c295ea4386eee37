"""What the ranks of a pool run for the ops."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megacpt.ops.cross_entropy import fused_cross_entropy


def sharded_cross_entropy(seed: int, tokens: int, width: int, dtype: str) -> tuple[list[float], list[list[float]]]:
    """Return this rank's losses and its shard of the gradient, for logits that all ranks draw alike."""
    rank, size = dist.get_rank(), dist.get_world_size()
    logits, target, weight = draw(seed, tokens, width * size, getattr(torch, dtype))
    mine = logits[:, rank * width : (rank + 1) * width].clone().requires_grad_()
    loss = fused_cross_entropy(mine * 1, target, rank * width, dist.group.WORLD)
    loss.backward(weight)
    assert mine.grad is not None
    return loss.tolist(), mine.grad.tolist()


def draw(seed: int, tokens: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, targets and gradients of the losses."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocab, generator=generator).mul_(4).to(dtype)
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    return logits, target, torch.randn(tokens, generator=generator)


def balanced(seed: int, tokens: int, experts: int) -> tuple[list[float], int, float]:
    """Return what Sinkhorn's algorithm finds for this rank's part of the tokens, balanced over all ranks."""
    from megacpt.ops.sinkhorn import sinkhorn
    from tests.ops.test_sinkhorn import skewed

    mine = skewed(tokens, experts, 2, 2, seed).chunk(dist.get_world_size())[dist.get_rank()]
    found = sinkhorn(mine, group=dist.group.WORLD)
    return found.log_u.tolist(), found.iterations, found.error
