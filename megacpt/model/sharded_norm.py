"""RMSNorm over a dim that tensor parallelism spreads over ranks: all heads of a token, the inner width of the MLP."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

Metadata = dict[str, Any] | None


class ShardedRMSNorm(MegatronModule):
    """`RMSNorm` of which each rank has a part of the last dim, and of the weight; the mean is that of the whole.

    Args:
        config: Megatron's configuration of the model.
        size: D, the whole last dim; the ranks of the group divide it.
        eps: added to the mean square.
        group: the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, size: int, eps: float, group: dist.ProcessGroup) -> None:
        super().__init__(config)
        self.size, self.eps, self.group = size, eps, group
        self.weight = nn.Parameter(torch.ones(size // group.size(), dtype=config.params_dtype))
        # Every rank sees all tokens of its part: nothing to sum, and the norm of the gradient counts all parts.
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim, of which `x` [.., D / tp] is this rank's part."""
        if self.group.size() == 1:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        part = wide.square().sum(-1, keepdim=True)
        # The sum goes to all ranks, and each sends a gradient back to it: both are sums over the group.
        whole = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(part, group=self.group), group=self.group
        )
        return (wide * torch.rsqrt(whole / self.size + self.eps) * self.weight.float()).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Metadata = None
    ) -> dict[str, Any]:
        """Describe the weight as this rank's part of that of all."""
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {}).get("dp_cp_group")
            or parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        return found


class AllHeadsNorm(ShardedRMSNorm):
    """RMSNorm of queries or keys over all heads of a token, as Megatron's `SelfAttention` builds it (OLMo 2).

    Args:
        config: Megatron's configuration of the model.
        hidden_size: d, width of a head.
        eps: added to the mean square.
        heads: of the whole model.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: int) -> None:
        super().__init__(config, heads * hidden_size, eps, parallel_state.get_tensor_model_parallel_group())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [s, b, n, d], the heads of this rank."""
        return super().forward(x.flatten(2)).view(x.shape)


class SubNorm:
    """A `RowLinear` that normalises what it multiplies, over all ranks' columns (BitNet b1.58's sub-norms).

    To be put before the class of the layer. Source: Wang et al. 2023, "BitNet", arXiv 2310.11453, section 2.1.
    """

    sub_norm: ShardedRMSNorm

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)  # type: ignore[call-arg]
        group: dist.ProcessGroup = self.tp_group  # type: ignore[attr-defined]
        self.sub_norm = ShardedRMSNorm(config, input_size, config.layernorm_epsilon, group)

    def forward(self, input_: Tensor) -> Any:
        """Normalise [s, b, i / tp], then project it."""
        return super().forward(self.sub_norm(input_))  # type: ignore[misc]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Metadata = None
    ) -> dict[str, Any]:
        """Describe the layer's parameters and those of the norm."""
        layer = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        return {**layer, **self.sub_norm.sharded_state_dict(f"{prefix}sub_norm.", sharded_offsets, metadata)}
