"""Decoder layers that differ from Megatron's in where they normalise and what they add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class ParallelResidualLayer(TransformerLayer):
    """Attention and MLP read the same residual stream: ``x + attention(norm_1(x)) + mlp(norm_2(x))``.

    Source: Black et al. 2022, "GPT-NeoX-20B", section 2.1.
    """

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """[s, b, h] to [s, b, h]; options are those of Megatron's layer."""
        options.pop("dynamic_inference_decode_only", None)
        attended, context = self._forward_attention(hidden_states, **options)
        normed = self._forward_pre_mlp_layernorm(hidden_states)
        out = self.mlp(normed, padding_mask=options.get("padding_mask"))
        with self.bias_dropout_add_exec_handler():
            add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
            return add(out, attended, self.hidden_dropout), context


class OutputNormLayer(TransformerLayer):
    """The outputs of attention and MLP are normalised, their inputs are not: ``x + norm_1(attention(x))``, and so on.

    Source: OLMo team 2024, "2 OLMo 2 Furious", arXiv 2501.00656, section 3.2.

    Args:
        args: of Megatron's layer.
        output_norm: makes a norm of the residual stream.
        options: of Megatron's layer.
    """

    def __init__(self, *args: Any, output_norm: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__(*args, **options)
        size, eps = self.config.hidden_size, self.config.layernorm_epsilon
        self.post_attention_layernorm = output_norm(self.config, size, eps)
        self.post_mlp_layernorm = output_norm(self.config, size, eps)
        self.self_attn_bda = _normalising(get_bias_dropout_add, self.post_attention_layernorm)
        self.mlp_bda = _normalising(get_bias_dropout_add, self.post_mlp_layernorm)


def _normalising(make: Callable[[bool, bool], Add], norm: nn.Module) -> Callable[[bool, bool], Add]:
    """What makes Megatron's sum of an output, with its bias, and the residual stream; the output normalised."""

    def made(training: bool, fused: bool) -> Add:
        add = make(training, fused)

        def normed(output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            x, bias = output
            return add((norm(x if bias is None else x + bias), None), residual, dropout)

        return normed

    return made
