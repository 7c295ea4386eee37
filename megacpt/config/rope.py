"""Rotary position embedding, and how it is stretched to longer contexts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megacpt.config.base import Count, Number, Problem, Section, raise_problems


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


class YarnScaling(Section):
    """YaRN: frequencies interpolated by how often they turn, attention scores sharpened (Peng et al. 2023)."""

    kind: Literal["yarn"] = Field(
        description="YaRN (Peng et al. 2023, arXiv 2309.00071): wavelengths that turn less than `beta_slow` times are "
        "stretched by `factor`, those that turn more than `beta_fast` times are kept, and scores are sharpened."
    )
    factor: Number = Field(
        ge=1, description="How many times longer the context becomes (no unit).", examples=[4.0, 40.0]
    )
    original_length: Count = Field(
        ge=1,
        description="Context length, in tokens, that the model was trained with before it was stretched.",
        examples=[4096],
    )
    beta_fast: Number = Field(
        default=32.0, gt=0, description="Dimensions that turn more often than this are left alone.", examples=[32.0]
    )
    beta_slow: Number = Field(
        default=1.0,
        gt=0,
        description="Dimensions that turn less often than this are fully stretched. It must be below `beta_fast`.",
        examples=[1.0],
    )
    mscale: Number = Field(
        default=1.0,
        ge=0,
        description="Queries and keys are multiplied by `m(mscale) / m(mscale_all_dim)`, with m(x) = 0.1 x ln(factor) "
        "+ 1 (m(0) is 1).",
        examples=[1.0],
    )
    mscale_all_dim: Number = Field(
        default=0.0,
        ge=0,
        description="With latent attention, scores are multiplied by m(mscale_all_dim) squared, as in DeepSeek-V3.",
        examples=[1.0],
    )

    @model_validator(mode="after")
    def _ordered(self) -> YarnScaling:
        if self.beta_fast <= self.beta_slow:
            text = f"{self.beta_fast:g} must be above beta_slow, which is {self.beta_slow:g}"
            raise_problems([Problem("beta_fast", text)])
        return self


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]


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
