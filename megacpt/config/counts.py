"""How many weights a network has."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megacpt.config.model import ModelConfig


def parameters(model: ModelConfig, vocab: int | None, active: bool) -> int:
    """Count trained parameters, as `ModelConfig.parameters` does."""
    embeddings = model.padded_vocab(vocab) * model.hidden * (1 if model.tied_embeddings else 2)
    feed_forward = sum(_experts(model, active) if moe else _mlp(model, model.ffn) for moe in model.moe_layers)
    layer = attention_weights(model) + _norms(model) + _biases(model)
    return embeddings + model.layers * layer + feed_forward + _norm(model)


def attention_weights(model: ModelConfig) -> int:
    """Elements of the matrices of one layer's attention."""
    latent, out = model.latent, model.heads * model.value_dim * model.hidden
    if latent is None:
        return model.hidden * (model.heads + 2 * model.kv_heads) * model.head_dim + out
    query = model.heads * model.head_dim
    queries = model.hidden * query if latent.q_rank is None else latent.q_rank * (model.hidden + query)
    down = model.hidden * (latent.kv_rank + latent.rope_dim)
    return queries + down + latent.kv_rank * model.heads * (latent.plain_dim + latent.value_dim) + out


def _norm(model: ModelConfig) -> int:
    """One norm of the residual stream."""
    return model.hidden if model.norm == "rmsnorm" else 2 * model.hidden


def _norms(model: ModelConfig) -> int:
    """All norms of a layer."""
    found = 2 * _norm(model)
    if model.qk_norm:
        found += model.head_dim * (model.heads + model.kv_heads if model.qk_norm == "all_heads" else 2)
    if model.latent is not None:
        found += model.latent.kv_rank + (model.latent.q_rank or 0)
    return found + (model.heads * model.value_dim + model.ffn if model.sub_norm else 0)


def _biases(model: ModelConfig) -> int:
    """All biases of a layer's matrices."""
    found = (model.heads + 2 * model.kv_heads) * model.head_dim if model.bias or model.qkv_bias else 0
    if model.bias:
        found += model.hidden + model.ffn * (2 if model.gated else 1) + model.hidden
    return found


def _mlp(model: ModelConfig, width: int) -> int:
    return model.hidden * width * (3 if model.gated else 2)


def _experts(model: ModelConfig, active: bool) -> int:
    """Router and experts of a layer, or those of them that a token uses."""
    assert model.moe is not None
    used = model.moe.top_k if active else model.moe.experts
    router = model.hidden * model.moe.experts
    return router + used * _mlp(model, model.expert_ffn) + _mlp(model, model.moe.shared_ffn)
