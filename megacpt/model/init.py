"""Initial weights that depend on the seed and a parameter's global name, not on the layout.

Megatron's sharded state dict says which part of which global tensor each local tensor is. Every rank draws the
global tensor from a generator seeded by (seed, global name) and keeps its part, so that one seed gives one model
under every TP, PP and DP.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from megacpt.model.builder import CausalLM

# Projections that write into the residual stream start smaller by sqrt(2 * layers) (GPT-2).
RESIDUAL_WRITERS = ("linear_proj.weight", "linear_fc2.weight")


def sharded_parameters(chunks: Sequence[CausalLM]) -> Iterator[ShardedTensor]:
    """Yield the local parameters as parts of global tensors, fused ones taken apart."""
    for chunk in chunks:
        for part in nested_values(chunk.sharded_state_dict()):
            if isinstance(part, ShardedTensorFactory):
                yield from nested_values(part.build())
            elif isinstance(part, ShardedTensor):
                yield part


def _draw(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Draw a global tensor in float32 on the CPU, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise(chunks: Sequence[CausalLM], init_std: float, seed: int) -> None:
    """Fill the weight matrices in place; norms and biases keep ones and zeros.

    Args:
        chunks: this rank's model chunks.
        init_std: standard deviation of the weights.
        seed: the run's seed.
    """
    layers = chunks[0].config.num_layers
    for part in sharded_parameters(chunks):
        if part.data is None or not part.key.endswith("weight") or "norm" in part.key:
            continue
        std = init_std / math.sqrt(2 * layers) if part.key.endswith(RESIDUAL_WRITERS) else init_std
        stacked = part.prepend_axis_num  # layers are stacked along a leading axis of the global tensor
        index = ".".join(str(i) for i in part.global_offset[:stacked])
        whole = _draw(f"{part.key}[{index}]", part.global_shape[stacked:], std, seed)
        where = tuple(
            slice(start, start + length)
            for start, length in zip(part.global_offset[stacked:], part.local_shape, strict=True)
        )
        part.data.copy_(whole[where])
