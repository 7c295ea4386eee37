"""From a `ModelConfig` to Megatron's modules: the configuration, the model of a pipeline stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megacpt.model.activation import ACTIVATIONS
from megacpt.model.latent import latent_settings
from megacpt.model.moe import dispatch_locally
from megacpt.model.norm import NORMS
from megacpt.model.rope import scale_frequencies
from megacpt.model.spec import layer_spec
from megacpt.ops.cross_entropy import fused_cross_entropy
from megacpt.runtime.device import on_cuda
from megacpt.runtime.layout import Layout

if TYPE_CHECKING:
    from megacpt.config import ModelConfig
    from megacpt.config.quantise import CacheForm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _leave(weight: Tensor) -> Tensor:
    """Initialise nothing."""
    return weight


def transformer_config(
    model: ModelConfig, layout: Layout, precision: str = "float32", recompute: str = "none"
) -> TransformerConfig:
    """Translate a model and its layout into Megatron's configuration.

    Args:
        model: the network.
        layout: the parallel layout.
        precision: ``float32`` or ``bfloat16`` (with float32 main parameters and gradients).
        recompute: ``none``, ``selective`` (core attention) or ``full`` (every layer).
    """
    cuda = on_cuda()
    interleaved = layout.virtual_pipeline > 1
    latent = {} if model.latent is None else latent_settings(model.latent, model.rope)
    config = (MLATransformerConfig if latent else TransformerConfig)(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        # Of norms of each head's queries and keys, Megatron sums the gradients over the tensor-parallel ranks.
        qk_layernorm=model.qk_norm is True,
        window_size=None if model.window is None else (model.window - 1, 0),  # tokens before and after its own
        normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model.norm],
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=model.gated,
        activation_func=ACTIVATIONS[model.activation],
        add_bias_linear=model.bias,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # `init.initialise` fills the weights, the same in every layout. Megatron's own initialisation has to run all
        # the same: it marks the parameters that are split, without which clipping would count shared ones twice.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        params_dtype=DTYPES[precision],
        pipeline_dtype=DTYPES[precision],
        bf16=precision == "bfloat16",
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence,
        # gloo swaps batched sends and receives between two ranks; unbatched, overlapped ones are right.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=cuda,
        # The sum of the losses is divided by the global number of valid tokens, whatever the accumulation.
        calculate_per_token_loss=True,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **_expert_settings(model, layout),
        **latent,
    )
    # Megatron's name for: the activation comes from the layer spec. At first it would ask for one that it knows.
    config.use_te_activation_func = True
    scaling = model.rope.scaling
    if scaling is not None and scaling.kind == "yarn":
        # Attributes that Megatron reads, but does not declare: they give the factor on rotated queries and keys.
        vars(config).update(
            yarn_rotary_scaling_factor=scaling.factor,
            yarn_mscale=scaling.mscale,
            yarn_mscale_all_dim=scaling.mscale_all_dim,
        )
    return config


def _expert_settings(model: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Megatron's settings of a model with experts; what is routed where is decided by `router.Router`."""
    if model.moe is None:
        return {}
    return {
        "num_moe_experts": model.moe.experts,
        "moe_router_topk": model.moe.top_k,
        "moe_router_pre_softmax": True,
        "moe_ffn_hidden_size": model.expert_ffn,
        "moe_shared_expert_intermediate_size": model.moe.shared_ffn or None,
        # A list, even where all layers have experts, so that layers are named one by one in checkpoints.
        "moe_layer_freq": [int(moe) for moe in model.moe_layers],
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": 1,
    }


class CausalLM(GPTModel):
    """Megatron's GPT model with megacpt's fused, vocabulary-parallel cross entropy."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy of each token, in nats.

        Args:
            labels: [b, s], ids of the whole vocabulary.
            logits: [s, b, V / tp], this rank's part of the vocabulary; overwritten by its gradient.

        Returns:
            [b, s], float32.
        """
        group = self.pg_collection.tp
        width = logits.shape[-1]
        flat = fused_cross_entropy(logits.reshape(-1, width), labels.t().reshape(-1), group.rank() * width, group)
        return flat.view(logits.shape[0], logits.shape[1]).t()


def build_stage(
    model: ModelConfig,
    config: TransformerConfig,
    padded_vocab: int,
    layout: Layout,
    virtual_stage: int | None = None,
    cache: CacheForm = "dense",
) -> CausalLM:
    """Build this rank's part of the model, uninitialised.

    Args:
        model: the network.
        config: its translation by `transformer_config`.
        padded_vocab: rows of the embedding.
        layout: the parallel layout.
        virtual_stage: which chunk of the rank, with interleaved pipelines.
        cache: how quantised weights are kept.
    """
    first = get_transformer_layer_offset(config, vp_stage=virtual_stage)
    last = first + get_num_layers_to_build(config, vp_stage=virtual_stage)
    specs = [layer_spec(model, layout, experts, cache) for experts in model.moe_layers[first:last]]
    stage = CausalLM(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(specs, layer_norm=NORMS[model.norm]),
        vocab_size=padded_vocab,
        max_sequence_length=model.max_seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="rope",
        rotary_percent=model.rope.share,
        rotary_base=model.rope.base,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        vp_stage=virtual_stage,
    )
    if layout.expert == 1:
        dispatch_locally(stage)
    for module in stage.modules():  # one for all layers; with latent attention, one for each
        if isinstance(module, RotaryEmbedding):
            module.inv_freq = scale_frequencies(module.inv_freq, model.rope)
    return stage


def build_model(
    model: ModelConfig, config: TransformerConfig, padded_vocab: int, layout: Layout, cache: CacheForm = "dense"
) -> list[CausalLM]:
    """Build this rank's model chunks: one, or one for each virtual pipeline stage; arguments as `build_stage`."""
    stages = [None] if layout.virtual_pipeline == 1 else range(layout.virtual_pipeline)
    return [build_stage(model, config, padded_vocab, layout, stage, cache) for stage in stages]
