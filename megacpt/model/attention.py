"""Causal attention over PyTorch's fused kernels, with context parallelism.

Shapes: s = local query length, t = key length, b = microbatch, h = query heads, g = key/value heads (grouped-query
attention), d = head dim of queries and keys, e = that of values (another with latent attention), n = context-parallel
ranks.

Context parallelism cuts each sequence of L tokens into 2n chunks; rank r holds chunks r and 2n-1-r, so that every
rank has the same amount of causal work. Keys and values are gathered over the context group; their gradient is
summed back to the ranks they came from.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from megacpt.errors import ConfigError


def context_slice(x: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """Return the two chunks of `x` along `dim` that context-parallel rank `rank` of `size` holds.

    Args:
        x: a tensor whose `dim` is a multiple of ``2 * size``.
        dim: the sequence dim.
        rank: this rank in the context group.
        size: ranks in the context group.
    """
    if size == 1:
        return x
    chunks = x.chunk(2 * size, dim)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim)


def _in_order(gathered: Tensor, size: int) -> Tensor:
    """Undo `context_slice` on keys or values gathered rank after rank along dim 0."""
    chunks = gathered.chunk(2 * size, 0)
    first, second = chunks[0::2], chunks[1::2]
    return torch.cat((*first, *reversed(second)), 0)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Any, causal: bool) -> Tensor:
    """Attention of [s, b, h, d] on keys [t, b, g, d] and values [t, b, g, e], giving [s, b, h, e]."""
    width = value.shape[-1]
    if width < key.shape[-1]:
        # The fused kernels want equal widths: without, all scores would be kept.
        value = F.pad(value, (0, key.shape[-1] - width))
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    if k.shape[1] != q.shape[1] and (not q.is_cuda or type(mask) is Tensor):
        # The fused CPU kernel wants equal head counts, and so does the CUDA one that takes any mask; the others of CUDA
        # read grouped heads in place.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    grouped = k.shape[1] != q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3)[..., :width]


def _window_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Which keys each query attends to, [s, t] bool: its own and those before it; queries are the last s of t."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window)


class CausalAttention(nn.Module):
    """The core attention that Megatron's `SelfAttention` calls between its projections.

    Args:
        config: Megatron's configuration of the model.
        layer_number: unused; part of Megatron's signature.
        attn_mask_type: unused, the mask is causal; part of Megatron's signature.
        attention_type: unused; part of Megatron's signature.
        attention_dropout: must be 0 or None.
        softmax_scale: factor of the scores, ``1 / sqrt(d)`` if None.
        cp_comm_type: unused; part of Megatron's signature.
        pg_collection: Megatron's process groups; ``cp`` is used.

    Attributes:
        window: tokens that each attends to at most, itself included; None for all before it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,  # noqa: ARG002
        attn_mask_type: AttnMaskType,  # noqa: ARG002
        attention_type: str,  # noqa: ARG002
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,  # noqa: ARG002
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if attention_dropout or config.attention_dropout:
            raise ConfigError("attention dropout is not supported; continual pre-training runs without it")
        self.scale = softmax_scale or float(config.kv_channels or 1) ** -0.5
        self.window = None if config.window_size is None else config.window_size[0] + 1
        self.context_group = None if pg_collection is None else pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,  # noqa: ARG002
        attn_mask_type: AttnMaskType | None = None,  # noqa: ARG002
        attention_bias: Tensor | None = None,  # noqa: ARG002
        packed_seq_params: Any = None,  # noqa: ARG002
    ) -> Tensor:
        """Attend causally: the queries are the last s of the t positions.

        Args:
            query: [s, b, h, d].
            key: [t, b, g, d]; t is s in training, the cached length in generation.
            value: [t, b, g, e].
            attention_mask: ignored, the mask is causal.
            attn_mask_type: ignored. Megatron asks for no mask at all once there is a cache, which is wrong for
                several new tokens at a time.
            attention_bias: unused; part of Megatron's signature.
            packed_seq_params: unused; part of Megatron's signature.

        Returns:
            [s, b, h * e].
        """
        size = 1 if self.context_group is None else self.context_group.size()
        out = self._context_parallel(query, key, value, size) if size > 1 else self._last(query, key, value)
        return out.reshape(*query.shape[:2], -1)

    def _last(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with the queries of the last s of t positions, [s, b, h, e]."""
        s, t = query.shape[0], key.shape[0]
        mask: Any = None
        if self.window is not None and self.window < t:
            first = max(0, t - s - self.window + 1)  # what lies before it, no query sees
            key, value = key[first:], value[first:]
            if s > 1:
                mask = _window_mask(s, t - first, self.window, query.device)
        elif 1 < s < t:
            mask = causal_lower_right(s, t)
        return _attend(query, key, value, self.scale, mask, causal=mask is None and s == t)

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor, size: int) -> Tensor:
        """Attend with this rank's two chunks of queries on all keys and values."""
        assert self.context_group is not None
        rank = self.context_group.rank()
        key, value = (
            _in_order(gather_from_sequence_parallel_region(x.contiguous(), group=self.context_group), size)
            for x in (key, value)
        )
        out = []
        for chunk, q in zip((rank, 2 * size - 1 - rank), query.chunk(2, 0), strict=True):
            seen = (chunk + 1) * q.shape[0]
            out.append(self._last(q, key[:seen], value[:seen]))
        return torch.cat(out, 0)
