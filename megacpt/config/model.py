"""The network: sizes and choices of a Llama-style decoder, dense or with experts, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megacpt.config.base import Count, Number, Problem, Section, raise_problems
from megacpt.config.moe import MoEConfig
from megacpt.config.quantise import QuantiseConfig, size_problems


class LinearScaling(Section):
    """Position interpolation: every position is divided by `factor` (Chen et al. 2023, arXiv 2306.15595)."""

    kind: Literal["linear"] = Field(description="Position interpolation: all positions are divided by one factor.")
    factor: Number = Field(
        ge=1,
        description="How many times longer the context becomes: positions are divided by this number (no unit).",
        examples=[4.0],
    )


class Llama3Scaling(Section):
    """Llama 3.1's scaling by wavelength: long ones are stretched, short ones kept, those between blended."""

    kind: Literal["llama3"] = Field(
        description="Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, "
        "those between are blended."
    )
    factor: Number = Field(
        default=8.0,
        ge=1,
        description="How many times the long wavelengths are stretched (no unit).",
        examples=[8.0],
    )
    low_freq_factor: Number = Field(
        default=1.0,
        gt=0,
        description="Wavelengths longer than `original_length / low_freq_factor` positions are fully stretched.",
        examples=[1.0],
    )
    high_freq_factor: Number = Field(
        default=4.0,
        gt=0,
        description="Wavelengths shorter than `original_length / high_freq_factor` positions are left "
        "alone. It must be above `low_freq_factor`.",
        examples=[4.0],
    )
    original_length: Count = Field(
        default=8192,
        ge=1,
        description="Context length, in tokens, that the model was trained with before it was stretched.",
        examples=[8192],
    )

    @model_validator(mode="after")
    def _ordered(self) -> Llama3Scaling:
        if self.high_freq_factor <= self.low_freq_factor:
            text = f"{self.high_freq_factor:g} must be above low_freq_factor, which is {self.low_freq_factor:g}"
            raise_problems([Problem("high_freq_factor", text)])
        return self


RopeScaling = Annotated[LinearScaling | Llama3Scaling, Field(discriminator="kind")]


class RopeConfig(Section):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

    base: Number = Field(
        default=10000.0,
        gt=1,
        description="Base of the geometric row of rotary wavelengths (theta). Larger bases reach further "
        "back: Llama 2 uses 10000, Llama 3 uses 500000.",
        examples=[10000.0, 500000.0],
    )
    share: Number = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Part of each head's dimensions that is rotated, from above 0 to 1; the rest carries no "
        "position. Llama rotates all (1.0), GPT-NeoX a quarter (0.25). It must leave an even number of "
        "dimensions.",
        examples=[1.0, 0.25],
    )
    scaling: RopeScaling | None = Field(
        default=None,
        description="How positions are stretched so that a model reads contexts longer than those it was "
        "trained on. null: not at all.",
    )


class ModelConfig(Section):
    """A decoder: RMSNorm before attention and MLP, rotary positions, grouped queries; dense or with experts."""

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
        description="Inner width of the MLP. With a gated activation (swiglu, geglu) the MLP has three "
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
    head_dim: Count = Field(
        default_factory=lambda data: data["hidden"] // data["heads"],
        ge=1,
        description="Width of one attention head. Default: `hidden / heads`.",
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
    activation: Literal["swiglu", "geglu", "gelu"] = Field(
        default="swiglu",
        description="Non-linearity of the MLP: swiglu and geglu multiply a SiLU or GELU gate with a second "
        "projection, gelu has a single projection.",
        examples=["swiglu"],
    )
    norm_eps: Number = Field(
        default=1e-5,
        gt=0,
        description="Small number added to the mean square in RMSNorm, against division by zero.",
        examples=[1e-5],
    )
    rope: RopeConfig = Field(default_factory=RopeConfig, description="Rotary position embedding.")
    qk_norm: bool = Field(
        default=False,
        description="Normalise queries and keys of each head (RMSNorm over `head_dim`) before the attention "
        "scores; steadies training at high learning rates.",
        examples=[True],
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
        raise_problems(list(self._size_problems()))
        return self

    def _size_problems(self) -> Iterator[Problem]:
        if self.heads % self.kv_heads:
            choices = _choices(n for n in range(1, self.heads + 1) if self.heads % n == 0)
            yield Problem("kv_heads", f"{self.kv_heads} does not divide heads, which is {self.heads}: take {choices}")
        if "head_dim" not in self.model_fields_set and self.hidden % self.heads:
            choices = _choices(n for n in range(1, self.hidden + 1) if self.hidden % n == 0 and n <= 2 * self.heads)
            yield Problem(
                "heads",
                f"{self.heads} does not divide hidden, which is {self.hidden}: take {choices}, or give head_dim",
            )
        elif self.rotary_dim < 2 or self.head_dim * self.rope.share != self.rotary_dim or self.rotary_dim % 2:
            yield Problem(
                "rope.share",
                f"{self.rope.share:g} of head_dim {self.head_dim} is {self.head_dim * self.rope.share:g} "
                "rotated dimensions, not an even whole number: take another share, or an even head_dim",
            )
        if self.moe is not None and self.bias:
            yield Problem("bias", "true: experts have no biases, so a model with model.moe has none: take false")
        if self.moe is not None and not any(self.moe_layers):
            text = f"{self.moe.first_dense} leaves no layer with experts; model.layers is {self.layers}"
            yield Problem("moe.first_dense", text)
        yield from size_problems(self)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that are rotated by position."""
        return int(self.head_dim * self.rope.share)

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
        embeddings = self.padded_vocab(vocab) * self.hidden * (1 if self.tied_embeddings else 2)
        feed_forward = sum(self._moe_parameters(active) if moe else self._mlp(self.ffn) for moe in self.moe_layers)
        return embeddings + self.layers * self._attention_parameters() + feed_forward + self.hidden

    def _attention_parameters(self) -> int:
        """Weights of the attention of a layer, with the norms and biases of the layer."""
        query, key_value = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        attention = self.hidden * (query + key_value) + query * self.hidden
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        biases = query + key_value if self.bias or self.qkv_bias else 0
        if self.bias:
            biases += self.hidden + self.ffn * (2 if self.gated else 1) + self.hidden
        return attention + norms + biases

    def _mlp(self, width: int) -> int:
        return self.hidden * width * (3 if self.gated else 2)

    def _moe_parameters(self, active: bool) -> int:
        assert self.moe is not None
        used = self.moe.top_k if active else self.moe.experts
        router = self.hidden * self.moe.experts
        return router + used * self._mlp(self.expert_ffn) + self._mlp(self.moe.shared_ffn)


def _choices(values: Iterator[int]) -> str:
    found = list(values)
    return " or ".join([", ".join(map(str, found[:-1])), str(found[-1])]) if len(found) > 1 else str(found[0])
