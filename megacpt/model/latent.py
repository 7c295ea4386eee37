"""Multi-head latent attention: Megatron's, with projections and rotation of our own.

Megatron's `MLASelfAttention` without Transformer Engine spreads the narrow projections over the tensor-parallel ranks,
where each rank keeps the gradient that its own heads send to the shared rotated key. Here they are whole on every rank.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1. Shapes: s = local sequence length, b = microbatch, n = heads on this
rank, p = plain dims of a head, r = rotated dims, v = dims of a value head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules, MultiLatentAttention
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor, nn

from megacpt.model.attention import CausalAttention
from megacpt.model.linear import ColumnLinear
from megacpt.model.norm import RMSNorm
from megacpt.model.rope import attention_factor

if TYPE_CHECKING:
    from megacpt.config.latent import LatentConfig
    from megacpt.config.rope import RopeConfig

if not isinstance(multi_latent_attention.TELinear, type):
    # Without Transformer Engine Megatron puts a mock there, takes it for the real one and fails.
    multi_latent_attention.HAVE_TE = False


class WholeLinear(nn.Module):
    """A projection that every tensor-parallel rank has whole.

    Args:
        config: Megatron's configuration of the model.
        inputs: width of what is multiplied.
        outputs: width of the result.
    """

    def __init__(self, config: MLATransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        # As for the weight of a norm: each rank sees a part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[.., i] to [.., o]."""
        return F.linear(x, self.weight)


class LatentAttention(MultiLatentAttention):
    """Queries, keys and values of all heads, made from narrow normalised vectors.

    Args:
        config: Megatron's configuration of the model.
        submodules: core attention and output projection.
        layer_number: from 1.
        attn_mask_type: part of Megatron's signature.
        pg_collection: Megatron's process groups.
        rope: how positions are rotated.
        options: of Megatron's attention.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        pg_collection: ProcessGroupCollection,
        rope: RopeConfig,
        **options: Any,
    ) -> None:
        super().__init__(
            config, submodules, layer_number, attn_mask_type, "self", pg_collection=pg_collection, **options
        )
        self.rope_factor = attention_factor(rope.scaling)
        heads, hidden, rank = config.num_attention_heads, config.hidden_size, config.q_lora_rank
        if rank is None:
            self.linear_q_proj = self._column(submodules.linear_q_proj, hidden, heads * self.q_head_dim)
        else:
            self.linear_q_down_proj = WholeLinear(config, hidden, rank)
            self.q_layernorm = RMSNorm(config, rank, config.layernorm_epsilon)
            self.linear_q_up_proj = self._column(submodules.linear_q_up_proj, rank, heads * self.q_head_dim)
        self.linear_kv_down_proj = WholeLinear(config, hidden, config.kv_lora_rank + config.qk_pos_emb_head_dim)
        self.kv_layernorm = RMSNorm(config, config.kv_lora_rank, config.layernorm_epsilon)
        wide = heads * (config.qk_head_dim + config.v_head_dim)
        self.linear_kv_up_proj = self._column(submodules.linear_kv_up_proj, config.kv_lora_rank, wide)

    def _column(self, layer: Any, inputs: int, outputs: int) -> Any:
        return build_module(
            layer,
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            tp_group=self.tp_group,
        )

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,  # noqa: ARG002
        position_ids: Tensor | None = None,  # noqa: ARG002
        packed_seq_params: Any = None,  # noqa: ARG002
        inference_context: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Project and rotate [s, b, h], s split over the ranks under sequence parallelism.

        Returns:
            Queries and keys [s, b, n, p + r], values [s, b, n, v], and twice nothing: what Megatron's own sparse
            attention would want.
        """
        config, n = self.config, self.num_attention_heads_per_partition
        plain, turned = config.qk_head_dim, config.qk_pos_emb_head_dim
        if config.q_lora_rank is None:
            wide, _bias = self.linear_q_proj(hidden_states)
        else:
            wide, _bias = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_states)))
        query = wide.view(*wide.shape[:2], n, plain + turned)
        narrow, key_turned = self.linear_kv_down_proj(hidden_states).split([config.kv_lora_rank, turned], -1)
        wide, _bias = self.linear_kv_up_proj(self.kv_layernorm(narrow))
        key_plain, value = wide.view(*wide.shape[:2], n, plain + config.v_head_dim).split(
            [plain, config.v_head_dim], -1
        )
        angles = self._angles(hidden_states, query.shape[0], inference_context)
        key_turned = self._rotated(self._for_all_heads(key_turned)[:, :, None], angles).expand(-1, -1, n, -1)
        query = torch.cat((query[..., :plain], self._rotated(query[..., plain:], angles)), -1)
        return query, torch.cat((key_plain, key_turned), -1), value, None, None

    def _for_all_heads(self, key: Tensor) -> Tensor:
        """The shared part of the keys [s, b, r] of the whole sequence; the gradients of all ranks' heads are summed."""
        if self.tp_group.size() == 1:
            return key
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(key, group=self.tp_group)  # type: ignore[no-any-return]
        return copy_to_tensor_model_parallel_region(key, group=self.tp_group)  # type: ignore[no-any-return]

    def _angles(self, hidden_states: Tensor, length: int, inference_context: Any) -> Tensor:
        """Angles of the positions that are read, [s, 1, 1, r]."""
        whole = self.rotary_pos_emb.get_rotary_seq_len(inference_context, None, hidden_states, self.config, None)
        first = 0 if inference_context is None else inference_context.sequence_len_offset
        angles: Tensor = self.rotary_pos_emb(whole)[first : first + length]
        return angles

    def _rotated(self, x: Tensor, angles: Tensor) -> Tensor:
        """Rotate [s, b, n, r]; pairs of neighbouring dims turn together."""
        return apply_rotary_pos_emb(  # type: ignore[no-any-return]
            x, angles, config=self.config, mscale=self.rope_factor, cp_group=self.pg_collection.cp
        )


def latent_settings(latent: LatentConfig, rope: RopeConfig) -> dict[str, Any]:
    """What Megatron's configuration has to know beside what it knows of every model."""
    yarn = rope.scaling if rope.scaling is not None and rope.scaling.kind == "yarn" else None
    return {
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.plain_dim,
        "qk_pos_emb_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "rope_type": "rope",  # frequencies are scaled by `rope.scale_frequencies`, as in every model
        "rotary_base": rope.base,
        # Megatron multiplies the scores by m(mscale_all_dim) squared.
        "rotary_scaling_factor": 1.0 if yarn is None else yarn.factor,
        "mscale_all_dim": 0.0 if yarn is None else yarn.mscale_all_dim,
    }


def latent_spec(rope: RopeConfig, linear_proj: Any) -> ModuleSpec:
    """The spec of latent attention with an output projection."""
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal, "rope": rope},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnLinear,
            linear_q_up_proj=ColumnLinear,
            linear_kv_up_proj=ColumnLinear,
            core_attention=CausalAttention,
            linear_proj=linear_proj,
        ),
    )
