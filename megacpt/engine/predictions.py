"""How well each token is predicted, in any layout: its loss, and whether it was the likeliest.

Shapes: n = microbatches, r = data-parallel ranks, b = sequences in a microbatch, L = tokens in a sequence, s = those of
them on this rank (context parallelism), N = b * s, V = this rank's columns of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megacpt.engine.protocol import Batch, Predictions
from megacpt.model.attention import context_slice
from megacpt.ops.cross_entropy import fused_cross_entropy

if TYPE_CHECKING:
    from megacpt.engine.megatron import MegatronEngine

_NO_TOKEN = torch.iinfo(torch.int64).max


def predict(engine: MegatronEngine, batches: Sequence[Batch]) -> Predictions:
    """See `protocol.Engine.predict`."""
    microbatch, length = batches[0].tokens.shape
    for chunk in engine.wrapped:
        chunk.eval()
    with torch.no_grad():
        outcomes: list[Tensor] = engine.schedule(
            forward_step_func=partial(_forward, engine),
            data_iterator=[iter(batches) for _ in engine.wrapped],
            model=engine.wrapped,
            num_microbatches=len(batches),
            seq_length=length - 1,
            micro_batch_size=microbatch,
            forward_only=True,
            collect_non_loss_data=True,
        )
    # Each rank fills in what it has computed, and the sum puts the pieces together: nothing else is added to them.
    whole_2nrbL = torch.zeros((2, len(batches), engine.data_size, microbatch, length - 1), device=engine.device)
    places = _own(engine, torch.arange(length - 1, device=engine.device), 0)
    for i, outcome_2bs in enumerate(outcomes):  # empty except on the last pipeline stage
        whole_2nrbL[:, i, engine.data_rank][..., places] = outcome_2bs
    dist.all_reduce(whole_2nrbL, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(whole_2nrbL, group=parallel_state.get_pipeline_model_parallel_group())
    nats, hits = whole_2nrbL.flatten(1, 3).cpu().numpy()
    return Predictions(nats, hits > 0)


def _forward(engine: MegatronEngine, batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[..., Tensor]]:
    """Megatron's forward step: logits of one microbatch, and the function that compares them with the targets."""
    tokens = torch.from_numpy(next(batches).tokens).to(engine.device, non_blocking=True)
    inputs, targets = (_own(engine, x, 1) for x in (tokens[:, :-1], tokens[:, 1:]))
    output = model(input_ids=inputs, position_ids=None, attention_mask=None)
    return output, partial(_outcome, targets, engine.vocab_size)


def _own(engine: MegatronEngine, x: Tensor, dim: int) -> Tensor:
    """This context-parallel rank's part of `x` along its sequence `dim`."""
    return context_slice(x, dim, parallel_state.get_context_parallel_rank(), engine.layout.context)


def _outcome(targets: Tensor, vocab_size: int, logits: Tensor, non_loss_data: bool = True) -> Tensor:  # noqa: ARG001
    """Loss of each target of [b, s], and 1 where it is the likeliest token, else 0; [2, b, s] float32."""
    group = parallel_state.get_tensor_model_parallel_group()
    logits_NV, targets_N = logits.flatten(0, 1), targets.flatten()
    nats_N = fused_cross_entropy(logits_NV, targets_N, group.rank() * logits_NV.shape[1], group)
    hits_N = targets_N == likeliest(logits_NV, group, vocab_size)
    return torch.stack((nats_N.float(), hits_N.float())).view(2, *targets.shape)


def likeliest(logits: Tensor, group: dist.ProcessGroup, vocab_size: int) -> Tensor:
    """The token with the largest logit in each row; of equal ones, the one with the lowest id.

    Args:
        logits: [N, V], this rank's columns of the padded vocabulary.
        group: the tensor-parallel ranks, which hold equally many columns each.
        vocab_size: ids of the tokenizer; those that only pad the vocabulary are never chosen.

    Returns:
        [N] int64, the same on every rank of the group.
    """
    first = group.rank() * logits.shape[1]
    own = min(logits.shape[1], vocab_size - first)
    if own > 0:
        top_N, token_N = logits[:, :own].max(1)
        top_N, token_N = top_N.float(), token_N + first
    else:
        top_N = logits.new_full(logits.shape[:1], -torch.inf, dtype=torch.float32)
        token_N = torch.full_like(top_N, _NO_TOKEN, dtype=torch.int64)
    if group.size() == 1:
        return token_N
    best_N = top_N.clone()
    dist.all_reduce(best_N, dist.ReduceOp.MAX, group)
    token_N = token_N.where(top_N == best_N, _NO_TOKEN)
    dist.all_reduce(token_N, dist.ReduceOp.MIN, group)
    return token_N
