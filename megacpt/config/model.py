"""The network: sizes and choices of a decoder, dense or with experts, and what follows from them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megacpt.config.base import Count, Number, Section, raise_problems
from megacpt.config.counts import parameters
from megacpt.config.latent import LatentConfig
from megacpt.config.moe import MoEConfig
from megacpt.config.network import network_problems
from megacpt.config.quantise import QuantiseConfig, size_problems
from megacpt.config.rope import RopeConfig


class ModelConfig(Section):
    """A decoder with rotary positions, by default Llama's; dense or with experts."""

    name: str | None = Field(
        default=None,
        description="A label for logs and reports, such as the name of the file in configs/models. It has "
        "no effect on the network.",
        examples=["tiny"],
    )
    layers: Count = Field(
        ge=1,
        description="Number of transformer blocks. `parallel.pipeline * parallel.virtual_pipeline` must divide it.",
        examples=[4, 32],
    )
    hidden: Count = Field(
        ge=2,
        description="Width of the residual stream: the length of the vector that stands for one token.",
        examples=[128, 4096],
    )
    ffn: Count = Field(
        ge=1,
        description="Inner width of the MLP. With a gated activation (all but gelu) the MLP has three "
        "matrices of `hidden * ffn`, else two. `parallel.tensor` must divide it.",
        examples=[352, 14336],
    )
    heads: Count = Field(
        ge=1,
        description="Number of attention (query) heads. `parallel.tensor` must divide it.",
        examples=[8, 32],
    )
    kv_heads: Count = Field(
        default_factory=lambda data: data["heads"],
        ge=1,
        description="Number of key and value heads; each serves `heads / kv_heads` query heads "
        "(grouped-query attention). Default: as many as `heads`, which is plain multi-head attention. It "
        "must divide `heads`.",
        examples=[8],
    )
    latent: LatentConfig | None = Field(
        default=None,
        description="Latent attention (DeepSeek-V2, V3) in the place of grouped queries: keys and values of all heads "
        "are made from one narrow vector. null: none.",
    )
    head_dim: Count = Field(
        default_factory=lambda sizes: _head_dim(sizes),
        ge=1,
        description="Width of one query and key head. Default: `hidden / heads`; `plain_dim + rope_dim` with latent "
        "attention.",
        examples=[64, 128],
    )
    vocab_size: Count | None = Field(
        default=None,
        ge=1,
        description="Number of entries of the vocabulary. null: that of the tokenizer. Give it where the "
        "weights come from elsewhere; it must not be smaller than the tokenizer's.",
        examples=[128256],
    )
    vocab_multiple: Count = Field(
        default=128,
        ge=1,
        description="The embedding is padded to a multiple of this many entries. It does not depend on the "
        "parallel layout, so that checkpoints fit any layout; `parallel.tensor` must divide the padded "
        "size.",
        examples=[128],
    )
    max_seq_length: Count = Field(
        default=2048,
        ge=1,
        description="Longest sequence, in tokens, that the model is meant for. `batch.seq_length` must not exceed it.",
        examples=[2048, 8192],
    )
    activation: Literal["swiglu", "geglu", "relu2glu", "gelu"] = Field(
        default="swiglu",
        description="Non-linearity of the MLP: swiglu, geglu and relu2glu multiply a gate (SiLU, GELU or squared ReLU) "
        "with a second projection, gelu has a single projection.",
        examples=["swiglu", "relu2glu"],
    )
    norm: Literal["rmsnorm", "layernorm"] = Field(
        default="rmsnorm",
        description="Normalisation of the residual stream: rmsnorm divides by the root mean square; layernorm takes "
        "off the mean first and has a bias (as in GPT-NeoX).",
        examples=["rmsnorm", "layernorm"],
    )
    norm_place: Literal["input", "output"] = Field(
        default="input",
        description="Whether the input of attention and MLP is normalised (as in Llama), or their output, before it is "
        "added to the residual stream (as in OLMo 2).",
        examples=["input", "output"],
    )
    parallel_residual: bool = Field(
        default=False,
        description="Attention and MLP of a layer read the same residual stream and are added together (as in "
        "GPT-NeoX), instead of one after the other.",
        examples=[True],
    )
    sub_norm: bool = Field(
        default=False,
        description="Normalise (RMSNorm) also what the last projection of attention, and that of the MLP, multiply, "
        "all heads together (as BitNet b1.58 does); steadies ternary models.",
        examples=[True],
    )
    window: Count | None = Field(
        default=None,
        ge=1,
        description="Each token attends to this many tokens at most, itself included (sliding window, as in Mistral "
        "7B v0.1). null: to all before it.",
        examples=[4096],
    )
    norm_eps: Number = Field(
        default=1e-5,
        gt=0,
        description="Small number added to the mean square or the variance in all norms, against division by zero.",
        examples=[1e-5],
    )
    rope: RopeConfig = Field(default_factory=RopeConfig, description="Rotary position embedding.")
    qk_norm: bool | Literal["all_heads"] = Field(
        default=False,
        description="Normalise queries and keys (RMSNorm) before the attention scores; steadies training at high "
        "learning rates. true: each head by itself (as Qwen 3); all_heads: all heads of a token together (as OLMo 2).",
        examples=[True, "all_heads"],
    )
    tied_embeddings: bool = Field(
        default=False,
        description="Use one matrix for the input embedding and the output projection. Saves `vocabulary * "
        "hidden` parameters; usual in small models.",
        examples=[True],
    )
    qkv_bias: bool = Field(
        default=False,
        description="Add biases to the query, key and value projections only (as Qwen 2 does).",
        examples=[True],
    )
    bias: bool = Field(
        default=False,
        description="Add biases to all linear layers of the blocks, query, key and value included (as "
        "GPT-NeoX does). The output projection to the vocabulary never has one.",
        examples=[True],
    )
    init_std: Number = Field(
        default=0.02,
        gt=0,
        description="Standard deviation of the normal distribution that new weights are drawn from; "
        "projections back into the residual stream are drawn with `init_std / sqrt(2 * layers)`.",
        examples=[0.02],
    )
    moe: MoEConfig | None = Field(
        default=None,
        description="Mixture of experts in the place of the MLP, in all layers or some of them. null: a dense model.",
    )
    quantise: QuantiseConfig | None = Field(
        default=None,
        description="Matrices of few bits, such as ternary ones, trained through latent weights. null: none. A stage "
        "may change it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, data: Any) -> Any:
        # `kv_heads: null` and `head_dim: null` read as "what follows from the other sizes".
        if isinstance(data, dict):
            return {
                key: value for key, value in data.items() if value is not None or key not in ("kv_heads", "head_dim")
            }
        return data

    @model_validator(mode="after")
    def _sizes_agree(self) -> ModelConfig:
        raise_problems([*network_problems(self), *size_problems(self)])
        return self

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that are rotated by position."""
        return int(self.head_dim * self.rope.share) if self.latent is None else self.latent.rope_dim

    @property
    def value_dim(self) -> int:
        """Width of a value head."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies a gate with a second projection."""
        return self.activation != "gelu"

    def padded_vocab(self, vocab: int | None = None) -> int:
        """Rows of the embedding: `vocab_size` (`vocab` where that is null), padded to `vocab_multiple`.

        Raises ValueError where neither is known.
        """
        size = self.vocab_size if self.vocab_size is not None else vocab
        if size is None:
            raise ValueError("the vocabulary is not known: give model.vocab_size, or the tokenizer's size")
        return -(-size // self.vocab_multiple) * self.vocab_multiple

    @property
    def moe_layers(self) -> list[bool]:
        """Which layers have experts."""
        return [False] * self.layers if self.moe is None else self.moe.layers(self.layers)

    @property
    def expert_ffn(self) -> int:
        """Inner width of one routed expert; that of the MLP in a dense model."""
        return self.ffn if self.moe is None or self.moe.ffn is None else self.moe.ffn

    def parameters(self, vocab: int | None = None, active: bool = False) -> int:
        """Number of trained parameters, the padded embedding included.

        Args:
            vocab: as for `padded_vocab`.
            active: count only those that a token uses: `top_k` of the experts.
        """
        return parameters(self, vocab, active)


def _head_dim(sizes: dict[str, Any]) -> int:
    """The width of a head that follows from the sizes before it."""
    latent: LatentConfig | None = sizes.get("latent")
    width: int = sizes["hidden"] // sizes["heads"] if latent is None else latent.head_dim
    return width
