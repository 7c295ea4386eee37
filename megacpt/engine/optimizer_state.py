"""One form on disk for every optimizer: float32 weights and running means, each in the shape of its parameter.

Megatron stores plain, mixed-precision and distributed optimizers in different forms that cannot read each other.
Here all of them are written as parts of the same global tensors:

    <name>                            float32 main weight (the model's own weight in float32 training)
    optimizer.state.<moment>.<name>   a running mean: exp_avg, and for Adam exp_avg_sq
    optimizer.count.<moment>.<name>   [layers] or [1], float64: how many updates are in the mean

so that a checkpoint loads into any layout, with or without the distributed optimizer, in float32 or bfloat16, and one
optimizer can go on with the means of another. Parameters that are frozen have no means; where only some layers are, the
others decide the shape, and those of the frozen ones are zeros of no updates.
Memory: with the distributed optimizer, saving and loading hold a full copy of this rank's parameters and means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megacpt.engine.shards import WEIGHT, gather, gather_counts, scatter
from megacpt.model.builder import CausalLM
from megacpt.optim.freeze import Frozen


def _part_of(template: Any, tensor: Tensor, prefix: str = "") -> Any:
    """Describe `tensor` as the same part of a global tensor as `template` is, under a prefixed name."""
    if isinstance(template, ShardedTensorFactory):
        return replace(template, key=prefix + template.key, data=tensor)
    return replace(template, key=prefix + template.key, data=tensor, dtype=tensor.dtype)


def _count_of(template: Any, count: float, prefix: str, expert: bool) -> ShardedTensor:
    """Describe a number that belongs to a parameter as this layer's entry of a tensor with one for each layer."""
    part = template.build()[0] if isinstance(template, ShardedTensorFactory) else template
    layer, layers = (part.global_offset[0], part.global_shape[0]) if part.prepend_axis_num else (0, 1)
    copy, _, data_rank = template.replica_id
    # Ranks that hold different parts of the parameter hold the same number: one of them writes it.
    other = parallel_state.get_tensor_model_parallel_rank()
    if expert:
        other = parallel_state.get_expert_model_parallel_rank()
    return ShardedTensor(
        key=prefix + template.key,
        data=torch.tensor([count], dtype=torch.float64),
        dtype=torch.float64,
        local_shape=(1,),
        global_shape=(layers,),
        global_offset=(layer,),
        axis_fragmentations=(layers,),
        replica_id=(copy, other, data_rank),
    )


class OptimizerState:
    """Reads and writes the weights and means of this rank.

    Args:
        chunks: this rank's model chunks.
        optimizer: Megatron's optimizer, or None where only weights are wanted.
        frozen: which parameters are not trained.
    """

    def __init__(self, chunks: Sequence[CausalLM], optimizer: Any | None, frozen: Frozen | None = None) -> None:
        self.chunks = chunks
        self.parts: list[Any] = [
            part for part in ([] if optimizer is None else optimizer.chained_optimizers) if not part.is_stub_optimizer
        ]
        self.moments: tuple[str, ...] = () if optimizer is None else optimizer.MOMENTS
        self.frozen: Frozen = frozen or {}
        # Rounded weights that no optimizer keeps in full: the float32 weights behind them wait in host memory.
        self.behind = {
            id(parameter): parameter.detach().float().cpu()
            for chunk in chunks
            for parameter in chunk.parameters()
            if id(parameter) in self.frozen and parameter.dtype != torch.float32
        }

    def _templates(self) -> dict[str, tuple[Any, Tensor]]:
        """Name every local parameter: its description as a part of a global tensor, and the parameter."""
        found: dict[str, tuple[Any, Tensor]] = {}
        for index, chunk in enumerate(self.chunks):
            for name, part in chunk.sharded_state_dict().items():
                if isinstance(part, ShardedTensor | ShardedTensorFactory) and part.data is not None:
                    found[f"{index}.{name}"] = (part, part.data)
        return found

    def _owners(self) -> dict[int, Any]:
        """Map each parameter (by identity) to the optimizer that updates it."""
        owners: dict[int, Any] = {}
        for part in self.parts:
            if isinstance(part, DistributedOptimizer):
                for buffer in part.buffers:
                    owners.update((id(p), part) for p in buffer.param_index_map)
            else:
                owners.update((id(model), part) for model, _ in _main_pairs(part))
        return owners

    def sharded(self) -> dict[str, Any]:
        """Describe weights and means for saving, or as the place to load into."""
        gathered, counts = self._gather()
        mains = self._mains()
        owners = self._owners()
        state: dict[str, Any] = {}
        for name, (template, parameter) in self._templates().items():
            whole = gathered.get((id(parameter), WEIGHT), self.behind.get(id(parameter)))
            state[name] = _part_of(template, (mains.get(id(parameter), parameter) if whole is None else whole).detach())
            owner = owners.get(id(parameter))
            if owner is None and self.frozen.get(id(parameter)) != "layer":
                continue  # evaluation, frozen, or a second copy of a tied embedding
            for moment in self.moments:
                value = gathered.get((id(parameter), moment))
                if owner is None:
                    value, count = torch.zeros_like(parameter, dtype=torch.float32), 0.0
                elif value is None:
                    main = mains[id(parameter)]
                    value, count = owner.optimizer.state[main][moment], owner.optimizer.counts[main][moment]
                else:
                    count = counts[id(parameter)][moment]
                state[f"{name}/{moment}"] = _part_of(template, value, f"optimizer.state.{moment}.")
                state[f"{name}/{moment}/count"] = _count_of(
                    template, count, f"optimizer.count.{moment}.", not getattr(parameter, "allreduce", True)
                )
        return state

    @torch.no_grad()
    def take(self, state: Mapping[str, Any]) -> None:
        """Copy loaded tensors to where the optimizer and the model keep them; a mean that is not there begins anew.

        Args:
            state: what `sharded` returned, with the descriptions replaced by loaded tensors.
        """
        mains = self._mains()
        owners = self._owners()
        for name, (_, parameter) in self._templates().items():
            parameter.copy_(state[name])
            if id(parameter) in self.behind:
                self.behind[id(parameter)].copy_(state[name])
            owner = owners.get(id(parameter))
            if owner is None:
                continue
            empty = torch.zeros((), dtype=torch.float32, device=parameter.device).expand(parameter.shape)
            values = {moment: state.get(f"{name}/{moment}", empty) for moment in self.moments}
            counts = {moment: float(state.get(f"{name}/{moment}/count", 0.0)) for moment in self.moments}
            if isinstance(owner, DistributedOptimizer):
                scatter(owner, parameter, {WEIGHT: state[name], **values}, counts)
                continue
            main = mains[id(parameter)]
            if main is not parameter:
                main.copy_(state[name])
            for moment, value in values.items():
                owner.optimizer.state[main][moment].copy_(value)
            owner.optimizer.counts[main] = counts

    def _mains(self) -> dict[int, Tensor]:
        """Map each parameter (by identity) to the float32 tensor that a plain optimizer updates."""
        return {
            id(model): main
            for part in self.parts
            if not isinstance(part, DistributedOptimizer)
            for model, main in _main_pairs(part)
        }

    def _gather(self) -> tuple[dict[tuple[int, str], Tensor], dict[int, dict[str, float]]]:
        """Bring the shards of distributed optimizers together, and the ages of their means."""
        full: dict[tuple[int, str], Tensor] = {}
        counts: dict[int, dict[str, float]] = {}
        for part in self.parts:
            if isinstance(part, DistributedOptimizer):
                full.update(gather(part, (WEIGHT, *self.moments)))
                counts.update(gather_counts(part, self.moments))
        return full, counts


def _main_pairs(part: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each model parameter of a plain optimizer with its float32 main parameter."""
    if hasattr(part, "float16_groups"):
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(models, mains, strict=True)
        for group in part.fp32_from_fp32_groups:
            yield from ((p, p) for p in group)
        return
    for group in part.optimizer.param_groups:
        yield from ((p, p) for p in group["params"])
