"""One form on disk for every optimizer: float32 weights and Adam's moments, each in the shape of its parameter.

Megatron stores plain, mixed-precision and distributed optimizers in different forms that cannot read each other.
Here all of them are written as parts of the same global tensors:

    <name>                              float32 main weight (the model's own weight in float32 training)
    optimizer.state.exp_avg.<name>      first moment
    optimizer.state.exp_avg_sq.<name>   second moment

so that a checkpoint loads into any layout, with or without the distributed optimizer, in float32 or bfloat16.
Memory: with the distributed optimizer, saving and loading hold a full copy of this rank's parameters and moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megacpt.model.builder import CausalLM

MOMENTS = ("exp_avg", "exp_avg_sq")


def _part_of(template: Any, tensor: Tensor, prefix: str = "") -> Any:
    """Describe `tensor` as the same part of a global tensor as `template` is, under a prefixed name."""
    if isinstance(template, ShardedTensorFactory):
        return replace(template, key=prefix + template.key, data=tensor)
    return replace(template, key=prefix + template.key, data=tensor, dtype=tensor.dtype)


class OptimizerState:
    """Reads and writes the weights and moments of this rank.

    Args:
        chunks: this rank's model chunks.
        optimizer: Megatron's optimizer, or None where only weights are wanted.
    """

    def __init__(self, chunks: Sequence[CausalLM], optimizer: Any | None) -> None:
        self.chunks = chunks
        self.parts: list[Any] = [] if optimizer is None else list(optimizer.chained_optimizers)
        self.distributed = any(isinstance(part, DistributedOptimizer) for part in self.parts)

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
            if part.is_stub_optimizer:
                continue
            if isinstance(part, DistributedOptimizer):
                for buffer in part.buffers:
                    owners.update((id(p), part) for p in buffer.param_index_map)
            else:
                owners.update((id(model), part) for model, _ in _main_pairs(part))
        return owners

    def sharded(self) -> dict[str, Any]:
        """Describe weights and moments for saving, or as the place to load into."""
        gathered = self._gather() if self.distributed else {}
        mains = self._mains()
        owners = self._owners()
        state: dict[str, Any] = {}
        for name, (template, parameter) in self._templates().items():
            weight = gathered.get((id(parameter), "param"), mains.get(id(parameter), parameter))
            state[name] = _part_of(template, weight.detach())
            owner = owners.get(id(parameter))
            if owner is None:  # evaluation, or a second copy of a tied embedding
                continue
            for moment in MOMENTS:
                value = gathered.get((id(parameter), moment))
                if value is None:
                    value = owner.optimizer.state[mains[id(parameter)]][moment]
                state[f"{name}/{moment}"] = _part_of(template, value, f"optimizer.state.{moment}.")
        state["step"] = self._step()
        return state

    @torch.no_grad()
    def take(self, state: dict[str, Any]) -> None:
        """Copy loaded tensors to where the optimizer and the model keep them.

        Args:
            state: what `sharded` returned, with the descriptions replaced by loaded tensors.
        """
        mains = self._mains()
        owners = self._owners()
        for name, (_, parameter) in self._templates().items():
            parameter.copy_(state[name])
            owner = owners.get(id(parameter))
            if owner is None:
                continue
            values = {"param": state[name], **{m: state[f"{name}/{m}"] for m in MOMENTS}}
            if isinstance(owner, DistributedOptimizer):
                _scatter(owner, parameter, values)
            else:
                main = mains[id(parameter)]
                if main is not parameter:
                    main.copy_(values["param"])
                for moment in MOMENTS:
                    owner.optimizer.state[main][moment].copy_(values[moment])
        for part in self.parts:
            if not part.is_stub_optimizer:
                for group in part.optimizer.param_groups:
                    group["step"] = int(state["step"])

    def _mains(self) -> dict[int, Tensor]:
        """Map each parameter (by identity) to the float32 tensor that a plain optimizer updates."""
        return {
            id(model): main
            for part in self.parts
            if not part.is_stub_optimizer and not isinstance(part, DistributedOptimizer)
            for model, main in _main_pairs(part)
        }

    def _gather(self) -> dict[tuple[int, str], Tensor]:
        """Bring the shards of distributed optimizers together: (parameter identity, kind) to a full tensor."""
        full: dict[tuple[int, str], Tensor] = {}
        for part in self.parts:
            if part.is_stub_optimizer or not isinstance(part, DistributedOptimizer):
                continue
            flat = part.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
            for index, buffer in enumerate(part.buffers):
                (tensors,) = flat[index].values()
                for parameter, (start, end, _) in buffer.param_index_map.items():
                    for kind in ("param", *MOMENTS):
                        full[id(parameter), kind] = tensors[kind][start:end].view(parameter.shape)
        return full

    def _step(self) -> int:
        """Return how many updates the optimizer has made."""
        steps = [g["step"] for part in self.parts if not part.is_stub_optimizer for g in part.optimizer.param_groups]
        return max(steps, default=0)


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


def _scatter(owner: Any, parameter: Tensor, values: dict[str, Tensor]) -> None:
    """Copy this rank's range of a full weight and its moments into a distributed optimizer's shard."""
    if parameter not in owner.model_param_gbuf_map:
        return
    where = owner._get_model_param_range_map(parameter)["param"]
    shard = {kind: value.reshape(-1)[where.start : where.end] for kind, value in values.items()}
    owner._set_main_param_and_optimizer_states(parameter, shard)
