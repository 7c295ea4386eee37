"""The spec of a decoder layer: which modules Megatron builds it from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megacpt.model.activation import Activation
from megacpt.model.attention import CausalAttention
from megacpt.model.latent import latent_spec
from megacpt.model.layer import OutputNormLayer, ParallelResidualLayer
from megacpt.model.moe import expert_layer_spec
from megacpt.model.norm import NORMS, RMSNorm
from megacpt.model.quantised import linear_layers
from megacpt.model.sharded_norm import AllHeadsNorm
from megacpt.runtime.layout import Layout

if TYPE_CHECKING:
    from megacpt.config import ModelConfig
    from megacpt.config.quantise import CacheForm


def layer_spec(model: ModelConfig, layout: Layout, experts: bool, cache: CacheForm = "dense") -> ModuleSpec:
    """Return the spec of a layer: attention and a feed-forward network or experts, each with its norm.

    Args:
        model: the network.
        layout: the parallel layout.
        experts: whether the layer has experts.
        cache: how quantised weights are kept.
    """
    norm = NORMS[model.norm]
    before = norm if model.norm_place == "input" else IdentityOp
    feed_forward = _mlp_spec(model, cache)
    if experts and model.moe is not None:
        feed_forward = expert_layer_spec(model, model.moe, layout.expert, cache)
    layer, options = TransformerLayer, {}
    if model.parallel_residual:
        layer = ParallelResidualLayer
    elif model.norm_place == "output":
        layer, options = OutputNormLayer, {"output_norm": norm}
    return ModuleSpec(
        module=layer,
        params=options,
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=_attention_spec(model, cache),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=before,
            mlp=feed_forward,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _attention_spec(model: ModelConfig, cache: CacheForm) -> ModuleSpec:
    linear_qkv, linear_proj = linear_layers(model, "attention", cache)
    if model.latent is not None:
        return latent_spec(model.rope, linear_proj)
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear_qkv,
            core_attention=CausalAttention,
            linear_proj=linear_proj,
            q_layernorm=_head_norm(model, model.heads),
            k_layernorm=_head_norm(model, model.kv_heads),
        ),
    )


def _head_norm(model: ModelConfig, heads: int) -> Any:
    """What normalises the queries, or the keys, of so many heads."""
    if model.qk_norm == "all_heads":
        return ModuleSpec(module=AllHeadsNorm, params={"heads": heads})
    return RMSNorm if model.qk_norm else IdentityOp


def _mlp_spec(model: ModelConfig, cache: CacheForm) -> ModuleSpec:
    linear_fc1, linear_fc2 = linear_layers(model, "mlp", cache)
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=linear_fc1, activation_func=Activation, linear_fc2=linear_fc2),
    )
