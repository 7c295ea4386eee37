"""The quantised matrices of a model, seen from the engine: made anew after each update, and counted.

A step's report tells which share of the codes is 0, and which share the update changed (flips), of the model and of
each layer; each code is counted once, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megacpt.model.quantised import QuantisedExpertWeights, Quantiser, refresh

if TYPE_CHECKING:
    from megacpt.config import ModelConfig

_COUNTS = 3  # codes, zeros, flips


class Quantisers:
    """All quantised matrices of this rank.

    Args:
        chunks: this rank's model chunks.
        model: the whole model.
        device: of communication.

    Attributes:
        gathered: identities of those that come quantised from other ranks (`code_gather`).
    """

    def __init__(self, chunks: Sequence[nn.Module], model: ModelConfig, device: torch.device) -> None:
        self.model, self.device = model, device
        self.gathered: frozenset[int] = frozenset()
        self.split: list[tuple[int, Quantiser]] = []
        self.experts: list[tuple[int, Quantiser]] = []
        for chunk in chunks:
            for layer in chunk.modules():
                if isinstance(layer, TransformerLayer):
                    self._add(layer)

    def _add(self, layer: TransformerLayer) -> None:
        for module in layer.modules():
            quantiser = getattr(module, "quantiser", None)
            if isinstance(quantiser, Quantiser):
                place = self.experts if isinstance(module, QuantisedExpertWeights) else self.split
                place.append((layer.layer_number, quantiser))

    @property
    def all(self) -> list[Quantiser]:
        """In the order of the model."""
        return [quantiser for _, quantiser in (*self.split, *self.experts)]

    def forget(self) -> None:
        """Weights were loaded, or changed otherwise."""
        for quantiser in self.all:
            quantiser.forget()

    def end_step(self, updated: bool) -> dict[str, float]:
        """Quantise what the optimizer has changed; all ranks call this.

        Args:
            updated: with False (a step that was skipped) the weights are what they were.

        Returns:
            Shares of the whole model and of each layer that has quantised matrices.
        """
        if self.model.quantise is None:
            return {}
        rest = [quantiser for quantiser in self.all if id(quantiser) not in self.gathered]
        if updated and rest:  # a pipeline stage may have none
            for quantiser in rest:
                quantiser.forget()  # the distributed optimizer writes to memory of which versions know nothing
            refresh(rest)
        counts = self._counts(updated)
        rows = {f"layer-{number}/": row for number, row in enumerate(counts.tolist(), 1)}
        found = {}
        for place, (codes, zeros, flips) in {"": counts.sum(0).tolist(), **rows}.items():
            if codes:
                found[f"quantise/{place}zeros"] = zeros / codes
                found[f"quantise/{place}flips"] = flips / codes
        return found

    def _counts(self, updated: bool) -> Tensor:
        """Codes, zeros and flips of each layer over all ranks, [layers, 3] int64."""
        split = self._summed(self.split, updated, parallel_state.get_tensor_model_parallel_group())
        experts = self._summed(self.experts, updated, parallel_state.get_expert_model_parallel_group())
        counts = split + experts
        dist.all_reduce(counts, group=parallel_state.get_pipeline_model_parallel_group())
        return counts.cpu()

    def _summed(self, own: Sequence[tuple[int, Quantiser]], updated: bool, group: dist.ProcessGroup) -> Tensor:
        """Sums over ranks of one group, each of which holds other codes, [layers, 3] int64."""
        counts = torch.zeros(self.model.layers, _COUNTS, dtype=torch.int64, device=self.device)
        for number, quantiser in own:
            counts[number - 1, 0] += quantiser.weight.numel()
            counts[number - 1, 1] += quantiser.zeros
            if updated:
                counts[number - 1, 2] += quantiser.flips
        dist.all_reduce(counts, group=group)
        return counts
