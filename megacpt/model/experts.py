"""The experts of a layer on this rank: two grouped matrix products around the activation.

Shapes: N = token rows, sorted by expert (those behind the last expert's belong to dropped choices and are never read),
e = experts on this rank, h = hidden, f = inner width of an expert (twice that out of the first product where the
activation is gated).

Weights of all experts are one tensor. On the CPU a product is made for each expert; on GPUs torch's grouped product
makes them all in one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megacpt.model.activation import Activation


class _EachExpert(torch.autograd.Function):
    """Rows times the transposed matrix of their expert, one product after another, without copies between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
        """[N, i], [e, o, i] to [N, o]."""
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(x.shape[0], weight.shape[1])
        first = 0
        for w, count in zip(weight, counts, strict=True):
            if count:
                torch.mm(x[first : first + count], w.t(), out=out[first : first + count])
            first += count
        out[first:] = 0  # never read, but the activation must not meet what memory held
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """[N, o] to [N, i] and [e, o, i]."""
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = torch.empty_like(x) if wants_x else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        first = 0
        for e, count in enumerate(ctx.counts):
            rows = slice(first, first + count)
            first += count
            if grad_x is not None and count:
                torch.mm(grad[rows], weight[e], out=grad_x[rows])
            if grad_weight is not None:
                if count:
                    torch.mm(grad[rows].t(), x[rows], out=grad_weight[e])
                else:
                    grad_weight[e].zero_()
        if grad_x is not None:
            grad_x[first:] = 0
        return grad_x, grad_weight, None


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply each row with the transposed matrix of its expert.

    Args:
        x: [N, i], sorted by expert.
        weight: [e, o, i].
        counts: [e] int64, rows of each expert.

    Returns:
        [N, o].
    """
    # The grouped product reads rows of whole multiples of 16 bytes.
    if x.is_cuda and x.dtype is torch.bfloat16 and not any(width % 8 for width in weight.shape[1:]):
        ends = counts.to(x.device).cumsum(0).int()  # Megatron's dispatcher hands out counts on the host
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    out: Tensor = _EachExpert.apply(x, weight, counts.tolist())
    return out


class ExpertWeights(MegatronModule):
    """One matrix of every expert on this rank.

    Args:
        config: Megatron's configuration of the model.
        experts: on this rank.
        outputs: width of the result.
        inputs: width of the rows.
        pg_collection: Megatron's process groups; ``ep`` and ``expt_dp`` are used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        experts: int,
        outputs: int,
        inputs: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.expert_group, self.replica_group = pg_collection.ep, pg_collection.expt_dp
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs, dtype=config.params_dtype))
        # Megatron's mark of an expert: its gradient is summed over the ranks that hold the same experts. Also where
        # all ranks do, so that the optimizer keeps its state in the same way in every layout.
        self.weight.allreduce = False  # type: ignore[attr-defined]
        # Nor are they copies that tensor-parallel ranks share, of which the norm of the gradient counts one.
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Multiply each row of [N, i], sorted by expert, with the matrix of its expert; [N, o]."""
        return grouped_linear(x, self.weight, counts)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the weight as a part of that of all experts, [E, o, i]."""
        del metadata
        first = len(sharded_offsets)
        part = ShardedTensor.from_rank_offsets(
            f"{prefix}weight",
            self.weight,
            *sharded_offsets,
            (first, self.expert_group.rank(), self.expert_group.size()),
            replica_id=(0, 0, self.replica_group.rank()),
            prepend_axis_num=first,
        )
        return {f"{prefix}weight": part}


class Experts(MegatronModule):
    """The experts on this rank, as Megatron's `MoELayer` builds them from a layer spec.

    Args:
        num_local_experts: on this rank.
        config: Megatron's configuration of the model.
        pg_collection: Megatron's process groups.
        first: makes the first matrices; takes the arguments of `ExpertWeights`.
        second: makes the second ones.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        first: Callable[..., ExpertWeights] = ExpertWeights,
        second: Callable[..., ExpertWeights] = ExpertWeights,
    ) -> None:
        super().__init__(config)
        width = config.moe_ffn_hidden_size
        assert width is not None
        inner = 2 * width if config.gated_linear_unit else width
        sizes = config.hidden_size, num_local_experts
        self.linear_fc1 = first(config, sizes[1], inner, sizes[0], pg_collection)
        self.linear_fc2 = second(config, sizes[1], sizes[0], width, pg_collection)
        self.activation = Activation(config)

    def forward(self, x: Tensor, counts: Tensor, weights: Tensor | None) -> tuple[Tensor, None]:
        """Put each row through its expert.

        Args:
            x: [N, h], sorted by expert.
            counts: [e] int64, rows of each expert.
            weights: [N] float32, factors of the results; None where the caller applies them.

        Returns:
            [N, h], and no bias.
        """
        inner = self.activation(self.linear_fc1(x, counts))
        out: Tensor = self.linear_fc2(inner, counts)
        return (out if weights is None else (out * weights[:, None]).to(out.dtype)), None
