"""Learning-rate schedules as a run file names them; `megacpt.optim` turns them into functions of tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megacpt.config.base import Number, Section
from megacpt.config.quantities import Duration, Rate

_WARMUP = (
    "Where the linear warmup from 0 to optim.peak_lr ends, counted from the start of the stage: a percentage "
    "of the stage, a number of steps, or a number of tokens. 0 starts at the peak."
)
_MIN_LR = (
    "The rate at which the schedule ends: absolute, or a percentage of optim.peak_lr. Not above the peak; 0 "
    "decays to nothing."
)


class _Warmed(Section):
    warmup: Duration = Field(default=Duration.parse("1%"), description=_WARMUP, examples=["1%", "500 steps"])


class ConstantSchedule(_Warmed):
    """Warmup, then the peak rate for ever. Needs no horizon."""

    kind: Literal["constant"] = Field(description="Warmup, then the peak rate for ever; needs no horizon.")


class LinearSchedule(_Warmed):
    """Warmup, then a straight line down to `min_lr` at the end of the stage."""

    kind: Literal["linear"] = Field(description="Warmup, then a straight line to min_lr at the end of the stage.")
    min_lr: Rate = Field(default=Rate.parse("10%"), description=_MIN_LR, examples=["10%", 3e-5])


class CosineSchedule(_Warmed):
    """Warmup, then half a cosine down to `min_lr` at the end of the stage (arXiv 2403.08763, eq. 1 and 2)."""

    kind: Literal["cosine"] = Field(description="Warmup, then half a cosine to min_lr at the end of the stage.")
    min_lr: Rate = Field(default=Rate.parse("10%"), description=_MIN_LR, examples=["10%", 3e-5])


class WsdSchedule(_Warmed):
    """Warmup, a stable phase at the peak rate, and a decay to `min_lr` over the last part of the stage."""

    kind: Literal["wsd"] = Field(
        description="Warmup, stable at the peak, then a decay over the last part of the stage."
    )
    decay: Duration = Field(
        default=Duration.parse("10%"),
        description="Length of the decay at the end of the stage: a percentage of the stage, steps, or "
        "tokens. 0: no decay in this stage (an anneal stage can follow).",
        examples=["10%"],
    )
    decay_shape: Literal["exponential", "linear", "cosine", "sqrt"] = Field(
        default="linear",
        description="Shape of the decay: exponential (equal factors), linear, cosine, or sqrt (1 - sqrt of "
        "the progress, which falls fast at first).",
        examples=["sqrt"],
    )
    min_lr: Rate = Field(default=Rate.parse("10%"), description=_MIN_LR, examples=["10%", 3e-5])


class InfiniteSchedule(_Warmed):
    """Warmup, cooldown to a constant rate, and that rate for ever (Singh et al. 2025, arXiv 2503.02844)."""

    kind: Literal["infinite"] = Field(
        default="infinite",
        description="Warmup, cooldown to a constant rate, then that rate for ever: later stages go on "
        "without re-warming, and an anneal stage makes a release. Needs no horizon once the cooldown is "
        "over.",
    )
    warmup: Duration = Field(
        default=Duration.parse("1%"),
        description="Where the linear warmup from 0 to optim.peak_lr ends, counted from the start of the "
        "stage (a cumulative end point, as in the papers' configurations): a percentage of the stage, "
        "steps, or tokens.",
        examples=["1%"],
    )
    cooldown: Duration = Field(
        default=Duration.parse("60%"),
        description="Where the cooldown from optim.peak_lr to constant_lr ends, counted from the start of "
        "the stage, not from the end of the warmup: `warmup: 1%, cooldown: 60%` cools from 1 % to 60 % of "
        "the stage. A cumulative end point, as in the papers' configurations; not before `warmup`.",
        examples=["60%"],
    )
    cooldown_shape: Literal["cosine", "inverse_sqrt", "linear"] = Field(
        default="cosine",
        description="Shape of the cooldown: half a cosine, an inverse square root (steep at first; see "
        "timescale), or a straight line.",
        examples=["inverse_sqrt"],
    )
    timescale: Number = Field(
        default=10.0,
        gt=0,
        description="Steepness (alpha) of the inverse_sqrt cooldown, h(p) = 1/sqrt(1 + alpha p) - 1, with p "
        "the progress from 0 to 1. Larger falls faster at first. The other shapes ignore it. No unit.",
        examples=[10.0],
    )
    constant_lr: Rate = Field(
        default=Rate.parse("55%"),
        description="The rate of the constant phase, which later stages go on with: absolute, or a "
        "percentage of optim.peak_lr. Between min_lr and the peak; the papers take the middle of both "
        "(1.65e-4 for 3e-4 and 3e-5).",
        examples=["55%", 1.65e-4],
    )
    min_lr: Rate = Field(
        default=Rate.parse("10%"),
        description="The rate at which annealing from this trunk ends: absolute, or a percentage of "
        "optim.peak_lr. The trunk itself never goes below constant_lr.",
        examples=["10%", 3e-5],
    )


class RewarmedCosineSchedule(_Warmed):
    """Warmup from the rate the previous stage ended at, then half a cosine to `min_lr` (arXiv 2403.08763)."""

    kind: Literal["rewarmed_cosine"] = Field(
        description="For continuing a model whose rate was decayed: warmup from the rate the stage enters "
        "with to the peak, then half a cosine to min_lr at the end of the stage."
    )
    warmup: Duration = Field(
        default=Duration.parse("1%"),
        description="Where the linear re-warming from the entry rate to optim.peak_lr ends, counted from "
        "the start of the stage: a percentage of the stage, steps, or tokens.",
        examples=["1%"],
    )
    min_lr: Rate = Field(default=Rate.parse("10%"), description=_MIN_LR, examples=["10%", 3e-5])


class AnnealSchedule(Section):
    """From the rate the stage enters with to `min_lr` at its end: a release branch (arXiv 2503.02844)."""

    kind: Literal["anneal"] = Field(
        description="For a stage of kind anneal: from the rate the stage enters with down to min_lr at its end."
    )
    shape: Literal["exponential", "linear", "cosine", "sqrt"] = Field(
        default="exponential",
        description="Shape of the decay: exponential, entry * (min_lr / entry) ** progress, as in the "
        "infinite schedule (needs min_lr above 0); linear; cosine; or sqrt (1 - sqrt of the progress).",
        examples=["exponential"],
    )
    min_lr: Rate = Field(default=Rate.parse("10%"), description=_MIN_LR, examples=["10%", 3e-5])


ScheduleConfig = Annotated[
    ConstantSchedule
    | LinearSchedule
    | CosineSchedule
    | WsdSchedule
    | InfiniteSchedule
    | RewarmedCosineSchedule
    | AnnealSchedule,
    Field(discriminator="kind"),
]
