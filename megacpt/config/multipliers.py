"""Factors on learning rate and weight decay for parts of the model."""

from __future__ import annotations

from pydantic import Field

from megacpt.config.base import Count, Number, Section

_LR = "Factor on the learning rate of this part; 0 leaves it as it is."


class NormMultiplier(Section):
    """Factor for parts without weight decay."""

    lr: Number = Field(default=1.0, ge=0, description=_LR, examples=[0.5])


class Multiplier(NormMultiplier):
    """Factors for one part of the model."""

    weight_decay: Number = Field(
        default=1.0,
        ge=0,
        description="Factor on the weight decay of this part's matrices; 0 for none. What a step takes away is the "
        "learning rate, with its factor, times the weight decay, with its own.",
        examples=[0.0],
    )


class LowerLayersMultiplier(Multiplier):
    """Factors for the first layers."""

    layers: Count = Field(
        default=1,
        ge=1,
        description="How many transformer layers, from the input on, the factors apply to.",
        examples=[2],
    )


class Multipliers(Section):
    """Factors by part of the model. A matrix in two parts, as in the MLP of a lower layer, gets both factors."""

    embeddings: Multiplier = Field(
        default_factory=Multiplier, description="The input embedding; with tied embeddings also the output matrix."
    )
    output: Multiplier = Field(
        default_factory=Multiplier, description="The output matrix (language-model head), if it is not tied."
    )
    norms: NormMultiplier = Field(
        default_factory=NormMultiplier, description="The scales of all norms; they never have weight decay."
    )
    attention: Multiplier = Field(
        default_factory=Multiplier, description="Queries, keys, values and the projection back, without their norms."
    )
    mlp: Multiplier = Field(
        default_factory=Multiplier, description="The MLP of each layer, without its norm; shared experts too."
    )
    router: Multiplier = Field(default_factory=Multiplier, description="The routers of a model with experts.")
    experts: Multiplier = Field(default_factory=Multiplier, description="The routed experts of a model with experts.")
    lower_layers: LowerLayersMultiplier = Field(
        default_factory=LowerLayersMultiplier, description="The first layers as a whole, norms included."
    )
