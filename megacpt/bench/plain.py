"""The same model and the same step in plain PyTorch: what the engine is measured and checked against.

Written as one would write it for a single device without Megatron, as fast as torch's own operations allow: batch
first, fused projections, `scaled_dot_product_attention`, the fused AdamW. Nothing here is used in training.

Shapes: b = microbatch, s = sequence length, h = query heads, g = key/value heads, d = head dim, V = padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacpt.convert.families.features import ANY, reasons
from megacpt.engine.protocol import Batch, StepReport
from megacpt.errors import ConfigError
from megacpt.model.rope import attention_factor, scale_frequencies

if TYPE_CHECKING:
    from megacpt.config import ModelConfig, RunConfig

_GATES: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu}
_SWITCH = (False, True)
_CHOICES: dict[str, tuple[object, ...]] = {
    "activation": ("swiglu", "geglu", "gelu"),
    "rope.share": (ANY,),
    **dict.fromkeys(("qk_norm", "qkv_bias", "bias"), _SWITCH),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _Norm(nn.Module):
    """RMSNorm over the last dim."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dims of each head of [b, h, s, d] by [s, r] angles; the other d - r pass."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return turned if not rest.shape[-1] else torch.cat((turned, rest), -1)


class _Attention(nn.Module):
    """Causal grouped-query attention with one projection for queries, keys and values."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.width = model.heads, model.kv_heads, model.head_dim
        inner = (self.heads + 2 * self.groups) * self.width
        self.qkv = nn.Linear(model.hidden, inner, bias=model.bias or model.qkv_bias)
        self.out = nn.Linear(self.heads * self.width, model.hidden, bias=model.bias)
        self.q_norm = _Norm(self.width, model.norm_eps) if model.qk_norm else nn.Identity()
        self.k_norm = _Norm(self.width, model.norm_eps) if model.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        sizes = [self.heads * self.width, self.groups * self.width, self.groups * self.width]
        q, k, v = (part.view(b, s, -1, self.width).transpose(1, 2) for part in self.qkv(x).split(sizes, -1))
        q, k = _rotate(self.q_norm(q), cos, sin), _rotate(self.k_norm(k), cos, sin)
        if self.groups != self.heads and not x.is_cuda:  # torch's fused CPU kernel takes equal head counts alone
            k, v = (part.repeat_interleave(self.heads // self.groups, 1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != self.heads)
        return self.out(out.transpose(1, 2).reshape(b, s, -1))  # type: ignore[no-any-return]


class _FeedForward(nn.Module):
    """The MLP, with gate and up projection in one matrix where it is gated."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.gate = _GATES.get(model.activation)
        self.up = nn.Linear(model.hidden, model.ffn * (2 if model.gated else 1), bias=model.bias)
        self.down = nn.Linear(model.ffn, model.hidden, bias=model.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gate is None:
            return self.down(F.gelu(x))  # type: ignore[no-any-return]
        gate, up = x.chunk(2, -1)
        return self.down(self.gate(gate) * up)  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = _Norm(model.hidden, model.norm_eps)
        self.attention = _Attention(model)
        self.mlp_norm = _Norm(model.hidden, model.norm_eps)
        self.mlp = _FeedForward(model)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class PlainModel(nn.Module):
    """The network of a `ModelConfig` in plain PyTorch.

    Args:
        model: the network.
        padded_vocab: V.

    Raises:
        ConfigError: it is a network that is not written here.
    """

    def __init__(self, model: ModelConfig, padded_vocab: int) -> None:
        super().__init__()
        found = list(reasons(model, "the plain model", _CHOICES))
        if found:
            raise ConfigError("\n".join(found))
        self.model = model
        self.embedding = nn.Embedding(padded_vocab, model.hidden)
        self.layers = nn.ModuleList(_Layer(model) for _ in range(model.layers))
        self.norm = _Norm(model.hidden, model.norm_eps)
        self.head = nn.Linear(model.hidden, padded_vocab, bias=False)
        if model.tied_embeddings:
            self.head.weight = self.embedding.weight
        self._angles: tuple[Tensor, Tensor] | None = None

    def _rotation(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions, [s, r], computed once."""
        if self._angles is None or self._angles[0].shape[0] != length:
            exponents = torch.arange(0, self.model.rotary_dim, 2, dtype=torch.float32) / self.model.rotary_dim
            frequencies = scale_frequencies(self.model.rope.base**-exponents, self.model.rope)
            angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
            factor = attention_factor(self.model.rope.scaling)
            self._angles = ((factor * angles.cos()).to(like), (factor * angles.sin()).to(like))
        return self._angles

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [b, s, V] of token ids [b, s]."""
        x = self.embedding(tokens)
        cos, sin = self._rotation(tokens.shape[1], x)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class PlainLoop:
    """An optimizer step over `PlainModel`, with the arithmetic of the engine's.

    In float32 gradients gather in `grad` and torch's fused AdamW updates the weights. In bfloat16 the optimizer works
    on float32 copies of weights and gradients, as the engine does.

    Args:
        config: the run; its parallel layout is not looked at, this is one process.
        vocab_size: ids of the tokenizer.
        device: where the model lives.
    """

    def __init__(self, config: RunConfig, vocab_size: int, device: torch.device) -> None:
        self.config = config
        padded = config.model.padded_vocab(vocab_size)
        self.model = PlainModel(config.model, padded).to(device, _DTYPES[config.precision])
        self.weights: list[Tensor] = list(self.model.parameters())
        self.mains = self.weights
        if config.precision != "float32":
            self.mains = [nn.Parameter(w.detach().float()) for w in self.weights]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [w for w in self.mains if w.dim() > 1], "decayed": True},
                {"params": [w for w in self.mains if w.dim() == 1], "decayed": False},
            ],
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )

    def load(self, named: Iterator[tuple[str, Tensor]]) -> None:
        """Take over the weights of a Megatron model of one process.

        Args:
            named: Megatron's parameters with their names.
        """
        with torch.no_grad():
            mine = dict(self.model.named_parameters())
            for name, weight in named:
                own, value = _translated(name, weight, self.config.model)
                mine.pop(own).copy_(value)
            for main, copied in zip(self.mains, self.weights, strict=True):
                main.copy_(copied)
        if mine:
            raise ValueError(f"the Megatron model lacks {', '.join(mine)}")

    def train_step(self, batches: Sequence[Batch], rate: float, weight_decay: float) -> StepReport:
        """One optimizer step on the microbatches; arguments and result as `engine.protocol.Engine.train_step`."""
        count = sum(b.tokens[:, 1:].size if b.valid is None else int(b.valid.sum()) for b in batches)
        total = self.accumulate(batches, count)
        norm = nn.utils.clip_grad_norm_(self.mains, self.config.optim.clip or torch.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = weight_decay if group["decayed"] else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.mains is not self.weights:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.mains)
        return StepReport(float(total) / count, count, float(norm), skipped=False)

    def accumulate(self, batches: Sequence[Batch], count: int) -> Tensor:
        """Forward and backward passes: the gradient of the mean over `count` tokens; returns the sum of the losses."""
        device = self.weights[0].device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in batches:
            tokens = torch.from_numpy(batch.tokens).to(device, non_blocking=True)
            labels = tokens[:, 1:]
            if batch.valid is not None:
                labels = labels.masked_fill(~torch.from_numpy(batch.valid).to(device), -100)
            logits = self.model(tokens[:, :-1]).float()
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            (loss / count).backward()
            total += loss.detach()
            self._gather()
        return total

    def _gather(self) -> None:
        """Add the gradients of a bfloat16 microbatch to those of the float32 weights."""
        if self.mains is self.weights:
            return
        for main, weight in zip(self.mains, self.weights, strict=True):
            assert weight.grad is not None
            main.grad = weight.grad.float() if main.grad is None else main.grad.add_(weight.grad)
            weight.grad = None


def _translated(name: str, weight: Tensor, model: ModelConfig) -> tuple[str, Tensor]:
    """A parameter's name in `PlainModel`, and its value laid out as there."""
    top = {
        "embedding.word_embeddings.weight": "embedding.weight",
        "decoder.final_layernorm.weight": "norm.weight",
        "output_layer.weight": "head.weight",
    }
    if name in top:
        return top[name], weight
    _, _, number, part = name.split(".", 3)
    owner, _, kind = part.rpartition(".")
    inside = {
        "input_layernorm": "attention_norm",
        "self_attention.linear_qkv": "attention.qkv",
        "self_attention.linear_proj": "attention.out",
        "self_attention.q_layernorm": "attention.q_norm",
        "self_attention.k_layernorm": "attention.k_norm",
        "pre_mlp_layernorm": "mlp_norm",
        "mlp.linear_fc1": "mlp.up",
        "mlp.linear_fc2": "mlp.down",
    }[owner]
    if inside == "attention.qkv":
        # Megatron lays one group after the other, its queries, its key, its value; here all queries come first.
        grouped = weight.view(model.kv_heads, model.heads // model.kv_heads + 2, model.head_dim, -1)
        parts = grouped[:, :-2].flatten(0, 1), grouped[:, -2], grouped[:, -1]
        weight = torch.cat([p.reshape(-1, *weight.shape[1:]) for p in parts])
    return f"layers.{number}.{inside}.{kind}", weight
