r"""The router of a layer of experts: which experts a token uses, with which weights, and what keeps the load even.

The losses follow one convention (`ops.balance`): every token adds its part, and the sum is divided by the global number
of tokens as the loss of the model is. Their strength depends on no layout, microbatch or accumulation; only which
choices are counted, the *scope*, is a choice.

What is learned about the load from one step to the next (the shares of the experts, Sinkhorn's bias, the bias of the
aux-free method) is a state of the model: it is in the checkpoint, changes at the end of a step and never within one, so
that microbatches and recomputed layers see the same numbers.

Shapes: s = local sequence length, b = microbatch, T = s * b tokens, E = experts, k = experts a token, h = hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megacpt.config.moe import BiasBalance, PenaltyBalance, SinkhornBalance
from megacpt.model.capacity import within_capacity
from megacpt.model.load import Load
from megacpt.ops.balance import assignments, balance_coefficients
from megacpt.ops.router import choose_experts, gated, softmax_sums
from megacpt.ops.router_reference import Routing, Scoring
from megacpt.ops.sinkhorn import sinkhorn

if TYPE_CHECKING:
    from megacpt.config.moe import MoEConfig


class Choice(NamedTuple):
    """Where the tokens of a microbatch go.

    Attributes:
        gates: [T, k] float32, weights of the experts' outputs; 0 for a dropped choice.
        experts: [T, k] int32; -1 for a dropped choice.
    """

    gates: Tensor
    experts: Tensor


class Router(MegatronModule):
    """Megatron's `RouterInterface`, over the fused router of `ops`.

    Args:
        config: Megatron's configuration of the model.
        pg_collection: Megatron's process groups.
        moe: the experts and their balance.
        dense: return dense tensors, as Megatron's dispatchers want them, instead of a `Choice`.

    Attributes:
        shares: [E] float32, the share of each expert in all choices of the last step.
        log_u: [E] float32, Sinkhorn's bias.
        choice_bias: [E] float32, the bias of the aux-free method.
        recorder: is told the layer's number and the experts [s, b, k] of every pass; for measurements.
    """

    shares: Tensor
    log_u: Tensor
    choice_bias: Tensor

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, moe: MoEConfig, dense: bool
    ) -> None:
        super().__init__(config)
        self.moe, self.dense = moe, dense
        self.microbatch_group: dist.ProcessGroup = pg_collection.tp_cp
        self.data_group: dist.ProcessGroup = pg_collection.tp_dp_cp
        on_logits = isinstance(moe.balance, SinkhornBalance)
        limits = moe.groups, moe.groups_kept
        self.scoring = Scoring(moe.top_k, moe.score, moe.renormalise, moe.scale, on_logits, *limits)
        self.weight = nn.Parameter(torch.empty(moe.experts, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.register_buffer("shares", torch.full((moe.experts,), 1 / moe.experts))
        self.register_buffer("log_u", torch.zeros(moe.experts))
        self.register_buffer("choice_bias", torch.zeros(moe.experts))
        self.load = Load(moe.experts)
        self.layer_number = 0
        self.recorder: Callable[[int, Tensor], None] | None = None

    def set_layer_number(self, layer_number: int) -> None:
        """Take the number of the layer in the model, from 1."""
        self.layer_number = layer_number

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route [s, b, h].

        Args:
            hidden: [s, b, h], what the experts will read.
            padding_mask: [s, b], False for padding; None if there is none.

        Returns:
            The gates and the experts of a `Choice`; or, for Megatron's dispatchers, the weights [T, E] float32 and
            which of them count [T, E] bool.
        """
        # In float32: the choice and the balance must not depend on the rounding of the model.
        logits = F.linear(hidden.float(), self.weight.float())
        bias = self._bias(logits.detach().flatten(0, 1), None if padding_mask is None else padding_mask.flatten())
        strength, scope = self._penalty()
        dim = 1 if scope == "sequence" else 0  # one part for each sequence, or all tokens as one
        parts = logits.unbind(1) if scope == "sequence" else [logits.flatten(0, 1)]
        masks = [None] * len(parts) if padding_mask is None else _masks(padding_mask, scope)
        routings = [choose_experts(part, self.scoring, bias, mask) for part, mask in zip(parts, masks, strict=True)]
        gates = self._gates(parts, routings, strength, scope) if self._learns else [r.gates for r in routings]
        routing = _joined(routings, dim)
        choice = Choice(_join(gates, dim), routing.experts)
        if self.moe.capacity is not None and self.training:
            kept = within_capacity(routing, self.moe.capacity, self.microbatch_group)
            choice = Choice(choice.gates * kept, routing.experts.where(kept, -1))
        if self.recorder is not None:
            self.recorder(self.layer_number, choice.experts.view(*hidden.shape[:2], -1))
        if self._learns:
            self.load.add(routing, choice.experts)
        return self._dense(choice) if self.dense else choice

    @property
    def _learns(self) -> bool:
        """Whether this pass is one to learn from: in training, and of two passes of a recomputed layer the second."""
        return self.training and torch.is_grad_enabled()

    def _bias(self, logits: Tensor, mask: Tensor | None) -> Tensor | None:
        """[E], what the choice is moved by."""
        balance = self.moe.balance
        if isinstance(balance, BiasBalance):
            return self.choice_bias
        if not isinstance(balance, SinkhornBalance) or not self.training:
            return None
        if balance.scope == "step":
            if self._learns:
                self.load.sinkhorn_sums += softmax_sums(logits, self.log_u, mask)
            return self.log_u
        balanced = sinkhorn(
            logits,
            log_u=self.log_u if balance.warm_start else None,
            mask=mask,
            group=self.data_group if balance.scope == "data" else None,
            tolerance=balance.tolerance,
            most_iterations=balance.iterations,
            rule=balance.rule,
        )
        if self._learns:
            self.load.add_log_u(balanced.log_u)
        return balanced.log_u

    def _penalty(self) -> tuple[float, str]:
        """Strength and scope of the balance loss."""
        balance = self.moe.balance
        if isinstance(balance, PenaltyBalance):
            return balance.strength, balance.scope
        if isinstance(balance, BiasBalance) and balance.sequence_strength > 0:
            return balance.sequence_strength, "sequence"
        return 0.0, "step"

    def _gates(self, parts: Sequence[Tensor], routings: Sequence[Routing], strength: float, scope: str) -> list[Tensor]:
        """The gates, with the gradients of the balance loss and the z-loss behind them.

        Args:
            parts: logits [T', E] of tokens whose choices are counted together.
            routings: theirs.
            strength: of the balance loss.
            scope: of the balance loss.
        """
        z = parts[0].new_full((1,), self.moe.z_loss)
        counts = torch.stack([routing.counts for routing in routings])
        if scope in ("sequence", "microbatch"):
            _sum(counts, self.microbatch_group)
        elif scope == "data":
            _sum(counts, self.data_group)
        found = []
        for part, routing, counted in zip(parts, routings, counts, strict=True):
            shares = self.shares.double() if scope == "step" else assignments(counted)
            coefficients = balance_coefficients(shares, strength)
            self.load.add_penalty(coefficients, routing.prob_sum)
            found.append(gated(part, routing, coefficients, z, self.scoring))
        return found

    def _dense(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """As weights [T, E] and which of them count."""
        tokens, width = choice.gates.shape[0], self.moe.experts
        kept = choice.experts >= 0
        slots = torch.where(kept, choice.experts, 0).long()
        weights = choice.gates.new_zeros(tokens, width).scatter_add(1, slots, torch.where(kept, choice.gates, 0))
        counts = torch.zeros(tokens, width, dtype=torch.int32, device=slots.device).scatter_add_(1, slots, kept.int())
        return weights, counts > 0


def _masks(padding_mask: Tensor, scope: str) -> Sequence[Tensor]:
    return padding_mask.unbind(1) if scope == "sequence" else [padding_mask.flatten()]


def _joined(routings: Sequence[Routing], dim: int) -> Routing:
    """One routing of all parts, in the order of the microbatch's tokens."""
    if len(routings) == 1:
        return routings[0]
    gates, experts, lse = (_join(part, dim) for part in zip(*(routing[:3] for routing in routings), strict=True))
    counts, prob_sum, z_sum = (torch.stack(sums).sum(0) for sums in zip(*(r[3:] for r in routings), strict=True))
    return Routing(gates, experts, lse, counts, prob_sum, z_sum)


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """[T', ...] of each part to [T, ...]; parts along `dim` 1 of a microbatch are sequences."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts), dim).flatten(0, 1)


def _sum(counts: Tensor, group: dist.ProcessGroup) -> None:
    """Sum whole numbers over the ranks of a group, in place."""
    if group.size() > 1:
        dist.all_reduce(counts, group=group)
