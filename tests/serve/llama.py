"""A small Llama with made-up weights, as a source of a decoder and as a plain model in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megacpt.config import ModelConfig
from megacpt.quant.matrix import Quantised, expand

SIZES: dict[str, Any] = {
    "layers": 3,
    "hidden": 64,
    "ffn": 96,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "vocab_size": 80,
    "vocab_multiple": 32,
    "max_seq_length": 48,
}


def model_config(**changes: Any) -> ModelConfig:
    """A small network; `changes` are laid over `SIZES`."""
    return ModelConfig.model_validate({**SIZES, **changes})


class MadeUp:
    """Random weights: projections as ternary codes, all else as it is.

    Args:
        model: the network.
        columns: scales along a row of a projection; its rows have one scale for each half.
        stored: the dtype of embedding and head.
        plain: parts of names whose matrices are not quantised.
    """

    def __init__(
        self,
        model: ModelConfig,
        columns: int = 1,
        stored: torch.dtype = torch.float32,
        plain: tuple[str, ...] = (),
        seed: int = 0,
    ) -> None:
        self.model = model
        self.matrices: dict[str, Quantised] = {}
        self.tensors: dict[str, Tensor] = {}
        draw = torch.Generator().manual_seed(seed)
        query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
        vocab = model.padded_vocab()
        self.tensors["model.embed_tokens.weight"] = torch.randn(vocab, model.hidden, generator=draw).to(stored)
        if not model.tied_embeddings:
            head = torch.randn(vocab, model.hidden, generator=draw) / model.hidden**0.5
            self.tensors["lm_head.weight"] = head.to(stored)
        norms = {"model.norm": model.hidden}
        for layer in range(model.layers):
            name = f"model.layers.{layer}"
            for part, o, i in (
                ("self_attn.q_proj", query, model.hidden),
                ("self_attn.k_proj", key, model.hidden),
                ("self_attn.v_proj", key, model.hidden),
                ("self_attn.o_proj", model.hidden, query),
                ("mlp.gate_proj", model.ffn, model.hidden),
                ("mlp.up_proj", model.ffn, model.hidden),
                ("mlp.down_proj", model.hidden, model.ffn),
            ):
                codes = torch.randint(-1, 2, (o, i), generator=draw, dtype=torch.int8)
                scales = (0.5 + torch.rand(2, columns, generator=draw)) / i**0.5
                matrix = Quantised(codes, scales)
                if any(word in part for word in plain):
                    self.tensors[f"{name}.{part}.weight"] = matrix.dense(torch.float32).to(stored)
                else:
                    self.matrices[f"{name}.{part}.weight"] = matrix
                if model.bias or (model.qkv_bias and part[-6] in "qkv" and "self_attn" in part):
                    self.tensors[f"{name}.{part}.bias"] = torch.randn(o, generator=draw) / 4
            norms |= {f"{name}.{part}": model.hidden for part in ("input_layernorm", "post_attention_layernorm")}
            if model.qk_norm:
                norms |= {f"{name}.self_attn.{part}_norm": model.head_dim for part in "qk"}
        for name, size in norms.items():
            self.tensors[f"{name}.weight"] = 0.5 + torch.rand(size, generator=draw)

    def names(self) -> Iterable[str]:
        return [*self.matrices, *self.tensors]

    def is_quantised(self, name: str) -> bool:
        return name in self.matrices

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def quantised(self, name: str) -> Quantised:
        return self.matrices[name]

    def exact(self, name: str) -> Tensor:
        """A weight in float64."""
        if name in self.tensors:
            return self.tensors[name].double()
        matrix = self.matrices[name]
        return matrix.codes.double() * expand(matrix.scales, *matrix.codes.shape).double()


def reference(source: MadeUp, tokens: list[int]) -> Tensor:
    """The logits of a Llama written plainly, in float64; [T, V]."""
    model, count = source.model, len(tokens)

    def linear(x: Tensor, name: str) -> Tensor:
        bias = source.tensors.get(f"{name}.bias")
        y = x @ source.exact(f"{name}.weight").T
        return y if bias is None else y + bias.double()

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + model.norm_eps).sqrt() * source.exact(f"{name}.weight")

    def rotate(x: Tensor) -> Tensor:
        half = model.rotary_dim // 2
        rates = [model.rope.base ** (-2 * j / model.rotary_dim) for j in range(half)]
        if model.rope.scaling is not None:
            rates = [rate / model.rope.scaling.factor for rate in rates]
        turns = torch.outer(torch.arange(count).double(), torch.tensor(rates).double())[:, None]
        pairs = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(turns), turns)
        return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :]), -1)

    x = source.exact("model.embed_tokens.weight")[tokens]
    for layer in range(model.layers):
        name = f"model.layers.{layer}"
        h = norm(x, f"{name}.input_layernorm")
        q, k, v = (linear(h, f"{name}.self_attn.{part}_proj").view(count, -1, model.head_dim) for part in "qkv")
        if model.qk_norm:
            q, k = norm(q, f"{name}.self_attn.q_norm"), norm(k, f"{name}.self_attn.k_norm")
        k, v = (part.repeat_interleave(model.heads // model.kv_heads, 1) for part in (rotate(k), v))
        scores = torch.einsum("qhd,khd->hqk", rotate(q), k) / model.head_dim**0.5
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(count, -1)
        x = x + linear(mixed, f"{name}.self_attn.o_proj")
        h = norm(x, f"{name}.post_attention_layernorm")
        x = x + linear(
            F.silu(linear(h, f"{name}.mlp.gate_proj")) * linear(h, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj"
        )
    head = "model.embed_tokens" if model.tied_embeddings else "lm_head"
    return norm(x, "model.norm") @ source.exact(f"{head}.weight").T
