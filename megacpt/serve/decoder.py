"""A lean decoder: prompts in one pass, then token by token with a cache of keys and values.

Shapes: T new tokens, L tokens read in all, H hidden, h query heads, g key/value heads (grouped-query attention), d head
dim, V padded vocabulary. One sequence at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from megacpt.errors import ConfigError
from megacpt.serve.linear import Activations, dense_linear
from megacpt.serve.native import native_step
from megacpt.serve.rotary import Rotary
from megacpt.serve.weights import EMBEDDING, FINAL_NORM, HEAD, Layer, Loader, Source

if TYPE_CHECKING:
    from megacpt.config import ModelConfig


class Cache:
    """Keys and values of one sequence, in memory that is taken once.

    Args:
        model: the network.
        capacity: the most tokens that it will hold.
        device: where.
        dtype: of what it holds.

    Attributes:
        keys: [layers, g, capacity, d].
        values: the same.
        length: tokens read so far.
    """

    def __init__(self, model: ModelConfig, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (model.layers, model.kv_heads, capacity, model.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0

    @property
    def capacity(self) -> int:
        """The most tokens that it holds."""
        return self.keys.shape[2]


class Decoder:
    """A Llama-style model that computes logits and nothing else.

    Args:
        source: its configuration and weights.
        activations: of the packed layers: ``float`` multiplies activations as they are, ``int8`` rounds them to 8 bits
            first, which is faster on the CPU, ``fp8`` to float8 as in training.
        device: where it computes.
        dtype: of activations, keys and values: float32, or the bfloat16 that CUDA's kernels take.
        native: compute single tokens by the compiled step, where there is one; else all by torch's operations.

    Raises:
        ConfigError: it is a network that has no code here.
        CheckpointError: a weight is missing or has a wrong shape.
    """

    def __init__(
        self,
        source: Source,
        activations: Activations = "float",
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        native: bool = True,
    ) -> None:
        self.model = model = source.model
        self.activations = activations
        self.device = device or torch.device("cpu")
        self.dtype = dtype
        loader = Loader(source, activations, self.device, dtype)
        self.embedding = loader.matrix(EMBEDDING, model.hidden)
        self.layers = [loader.layer(index) for index in range(model.layers)]
        self.final_norm = loader.vector(FINAL_NORM, model.hidden)
        if model.tied_embeddings:
            self.head = dense_linear(self.embedding, dtype)
        else:
            self.head = loader.linear([HEAD], [len(self.embedding)], model.hidden)
        self.rotary = Rotary(model, model.max_seq_length, self.device)
        self._step = native_step(self) if native else None

    def cache(self, capacity: int | None = None) -> Cache:
        """An empty cache for a sequence of `capacity` tokens; by default the longest of the model."""
        longest = self.model.max_seq_length
        return Cache(self.model, min(capacity or longest, longest), self.device, self.dtype)

    def feed(self, tokens: Sequence[int], cache: Cache) -> Tensor:
        """Read further tokens of the sequence in `cache`; the logits after the last, [V] float32.

        Raises:
            ConfigError: they do not fit into the cache.
        """
        if self._step is None or len(tokens) > 1:
            return self.logits(tokens, cache, last=True)[0]
        self._check_room(1, cache)
        found = self._step(tokens[0], cache.length, cache.keys, cache.values)
        cache.length += 1
        return found

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], cache: Cache, last: bool = False) -> Tensor:
        """The logits after each of further tokens, [T, V] float32; with `last` those after the last alone, [1, V].

        Raises:
            ConfigError: they do not fit into the cache.
        """
        self._check_room(len(tokens), cache)
        x = F.embedding(torch.tensor(tokens, device=self.device), self.embedding).to(self.dtype)
        for index, layer in enumerate(self.layers):
            x = self._attend(layer, x, cache.keys[index], cache.values[index], cache.length)
            gate, up = layer.gate_up(self._norm(x, layer.mlp_norm)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        cache.length += len(tokens)
        return self.head(self._norm(x[-1:] if last else x, self.final_norm)).float()

    def _check_room(self, count: int, cache: Cache) -> None:
        end = cache.length + count
        if end > cache.capacity:
            raise ConfigError(
                f"{end:,} tokens are more than the {cache.capacity:,} that there is room for; model.max_seq_length is "
                f"{self.model.max_seq_length:,}"
            )

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.model.norm_eps)

    def _attend(self, layer: Layer, x: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """Add the attention of [T, H] on everything read so far; writes to keys and values, [g, capacity, d]."""
        model, count = self.model, len(x)
        heads, groups, end = model.heads, model.kv_heads, start + count
        joined = layer.qkv(self._norm(x, layer.attention_norm)).view(count, heads + 2 * groups, model.head_dim)
        turning = joined[:, : heads + groups]
        if layer.query_norm is not None and layer.key_norm is not None:
            parts = turning.split((heads, groups), 1)
            normed = zip(parts, (layer.query_norm, layer.key_norm), strict=True)
            turning = torch.cat([self._norm(part, weight) for part, weight in normed], 1)
        queries, new_keys = self.rotary(turning, start).split((heads, groups), 1)
        keys[:, start:end] = new_keys.transpose(0, 1)
        values[:, start:end] = joined[:, heads + groups :].transpose(0, 1)
        return x + layer.output(attention(queries, keys[:, :end], values[:, :end]))


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last T of L tokens: [T, h, d] on [g, L, d] twice, giving [T, h d]."""
    count, heads, width = queries.shape
    groups, length = keys.shape[:2]
    if count == 1:
        # The query heads that share a key stand as so many queries: nothing is repeated.
        grouped = queries.view(1, groups, heads // groups, width)
        return F.scaled_dot_product_attention(grouped, keys[None], values[None]).reshape(1, heads * width)
    # torch.nn.attention.bias has this mask too, and takes seconds to import.
    mask = (
        None
        if count == length
        else torch.ones(count, length, dtype=torch.bool, device=keys.device).tril(length - count)
    )
    keys, values = (part.repeat_interleave(heads // groups, 0)[None] for part in (keys, values))
    found = F.scaled_dot_product_attention(queries.transpose(0, 1)[None], keys, values, mask, is_causal=mask is None)
    return found[0].transpose(0, 1).reshape(count, heads * width)
