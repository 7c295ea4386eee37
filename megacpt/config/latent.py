"""Latent attention: keys and values of all heads made from one narrow vector."""

from __future__ import annotations

from pydantic import Field

from megacpt.config.base import Count, Section


class LatentConfig(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    kv_rank: Count = Field(
        ge=1,
        description="Width of the latent vector that keys and values of all heads are made from.",
        examples=[512],
    )
    q_rank: Count | None = Field(
        default=None,
        ge=1,
        description="Width of the latent vector that queries are made from. null: queries come straight from the "
        "residual stream.",
        examples=[1536],
    )
    plain_dim: Count = Field(
        ge=1, description="Dimensions of each query and key head that carry no position.", examples=[128]
    )
    rope_dim: Count = Field(
        ge=2,
        multiple_of=2,
        description="Dimensions of each query and key head that are rotated by position; all key heads share theirs.",
        examples=[64],
    )
    value_dim: Count = Field(ge=1, description="Width of a value head.", examples=[128])

    @property
    def head_dim(self) -> int:
        """Width of a query and key head."""
        return self.plain_dim + self.rope_dim
