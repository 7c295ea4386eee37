"""Learning-rate schedules as a run file names them; `megacpt.optim` turns them into functions of tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megacpt.config.base import Interval, Number, Section
from megacpt.config.quantities import Duration, Rate, Share

DecayShape = Literal["exponential", "linear", "cosine", "sqrt", "rex", "reciprocal"]

_WARMUP = (
    "Where the linear warmup from 0 to optim.peak_lr ends, counted from the start of the stage: a percentage "
    "of the stage, a number of steps, or a number of tokens. 0 starts at the peak."
)
_MIN_LR = (
    "The rate at which the schedule ends: absolute, or a percentage of optim.peak_lr. Not above the peak; 0 "
    "decays to nothing."
)
_SHAPES = (
    "exponential (equal factors), linear, cosine, sqrt (1 - sqrt of the progress, which falls fast at first), rex "
    "((1-p)/(1-p/2), which falls fast at the end; arXiv 2107.04197), or reciprocal (a straight line in 1/rate; arXiv "
    "2410.05192). exponential and reciprocal need min_lr above 0."
)


class _Sampled(Section):
    sampling: Interval = Field(
        default=Duration.parse("1 step"),
        description="How often the falling part of the schedule is read, counted from where the fall begins: the "
        "rate stays the same in between. 1 step is the smooth curve; a third of the stage makes three stairs. Steps, "
        "tokens, or a percentage of the stage. The warmup is always smooth.",
        examples=["1 step", "33.34%"],
    )


class _Undecayed(Section):
    weight_decay_until: Duration | None = Field(
        default=None,
        description="Where the weight decay ends, counted from the start of the stage: a percentage of the stage, "
        "steps, or tokens; it is 0 from there on. Helps ternary models (arXiv 2407.12327). null: it stays.",
        examples=["66.6667%"],
    )


class _Warmed(Section):
    warmup: Duration = Field(default=Duration.parse("1%"), description=_WARMUP, examples=["1%", "500 steps"])


class ConstantSchedule(_Warmed):
    """Warmup, then the peak rate for ever. Needs no horizon."""

    kind: Literal["constant"] = Field(description="Warmup, then the peak rate for ever; needs no horizon.")


class LinearSchedule(_Undecayed, _Sampled, _Warmed):
    """Warmup, then a straight line down to `min_lr` at the end of the stage."""

    kind: Literal["linear"] = Field(description="Warmup, then a straight line to min_lr at the end of the stage.")
    min_lr: Rate = Field(default=Rate.parse("10%"), description=_MIN_LR, examples=["10%", 3e-5])


class CosineSchedule(_Undecayed, _Sampled, _Warmed):
    """Warmup, then half a cosine down to `min_lr` at the end of the stage (arXiv 2403.08763, eq. 1 and 2)."""

    kind: Literal["cosine"] = Field(description="Warmup, then half a cosine to min_lr at the end of the stage.")
    min_lr: Rate = Field(default=Rate.parse("10%"), description=_MIN_LR, examples=["10%", 3e-5])


class RexSchedule(_Undecayed, _Sampled, _Warmed):
    """Warmup, then the reflected exponential down to `min_lr` (Chen et al. 2021, arXiv 2107.04197)."""

    kind: Literal["rex"] = Field(
        description="Warmup, then REX, peak * (1-p)/(1-p/2), to min_lr at the end of the stage: slower than a line at "
        "first, faster at the end; good for short budgets."
    )
    min_lr: Rate = Field(default=Rate.parse(0), description=_MIN_LR, examples=["10%", 3e-5])


class TrilmSchedule(_Undecayed, _Sampled, _Warmed):
    """TriLM's: a straight line whose peak drops, and weight decay that ends (Spectra, arXiv 2407.12327)."""

    kind: Literal["trilm"] = Field(
        description="For ternary models: warmup, a straight line to min_lr, half-way a drop to the line from a lower "
        "peak, and no weight decay in the last third."
    )
    second_from: Duration = Field(
        default=Duration.parse("50%"),
        description="Where the rate drops to the line from second_lr, counted from the start of the stage: a "
        "percentage of the stage, steps, or tokens.",
        examples=["50%"],
    )
    second_lr: Rate = Field(
        default=Rate.parse("67%"),
        description="The peak from which the second line comes down: absolute, or a percentage of optim.peak_lr.",
        examples=["67%", 2e-4],
    )
    weight_decay_until: Duration | None = Field(
        default=Duration.parse("66.6667%"),
        description="Where the weight decay ends, counted from the start of the stage: a percentage of the stage, "
        "steps, or tokens; it is 0 from there on. null: it stays.",
        examples=["66.6667%"],
    )
    min_lr: Rate = Field(default=Rate.parse(0), description=_MIN_LR, examples=["10%", 3e-5])


class WsdSchedule(_Undecayed, _Sampled, _Warmed):
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
    decay_shape: DecayShape = Field(
        default="linear",
        description=f"Shape of the decay: {_SHAPES}",
        examples=["sqrt"],
    )
    min_lr: Rate = Field(default=Rate.parse("10%"), description=_MIN_LR, examples=["10%", 3e-5])


class WsdSSchedule(_Sampled, _Warmed):
    """WSD-S: a decay to each release, after which the rate is back at the peak (Wen et al. 2024, arXiv 2410.05192)."""

    kind: Literal["wsd_s"] = Field(
        description="Warmup, stable at the peak, and a decay before each of several releases, after which training "
        "goes on at the peak: the decayed tokens are not lost. A stage that continues one is not warmed up again."
    )
    releases: list[Interval] = Field(
        default=[Duration.parse("100%")],
        min_length=1,
        description="Where each decay ends, counted from the start of the stage: percentages of the stage, steps, or "
        "tokens, in ascending order; rounded up to whole steps. Save checkpoints there.",
        examples=["[25%, 50%, 100%]"],
    )
    decay: Duration = Field(
        default=Duration.parse("10%"),
        description="Length of the decay before each release: a percentage of the tokens since the previous release, "
        "steps, or tokens.",
        examples=["10%"],
    )
    decay_shape: DecayShape = Field(
        default="reciprocal", description=f"Shape of the decays; the paper's is reciprocal. One of {_SHAPES}"
    )
    min_lr: Rate = Field(default=Rate.parse("10%"), description=_MIN_LR, examples=["10%", 3e-5])

    def decays(self, stage_tokens: int, tokens_per_step: int) -> tuple[tuple[int, int], ...]:
        """Token at which each decay starts and ends; raise ValueError where they don't fit."""
        found = []
        free = warm = self.warmup.tokens(stage_tokens, tokens_per_step)
        previous, last = 0, -(-stage_tokens // tokens_per_step) * tokens_per_step
        for release in self.releases:
            stop = release.steps(stage_tokens, tokens_per_step) * tokens_per_step
            if stop <= previous or stop > last:
                raise ValueError(f"{release} is not behind the one before it and within the stage: list them in order")
            turn = stop - self.decay.tokens(stop - previous, tokens_per_step)
            if turn < free:
                before = "the warmup" if free == warm else "the previous release"
                raise ValueError(f"the decay before {release} would start before {before} ends: shorten schedule.decay")
            found.append((turn, stop))
            previous = free = stop
        return tuple(found)


class InfiniteSchedule(_Sampled, _Warmed):
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


class RewarmedCosineSchedule(_Undecayed, _Sampled, _Warmed):
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


class AnnealSchedule(_Undecayed, _Sampled):
    """From the rate the stage enters with to `min_lr` at its end: a release branch (arXiv 2503.02844)."""

    kind: Literal["anneal"] = Field(
        description="For a stage of kind anneal: from the rate the stage enters with down to min_lr at its end."
    )
    shape: DecayShape = Field(
        default="exponential",
        description=f"Shape of the decay; the infinite schedule's is exponential. One of {_SHAPES}",
        examples=["exponential"],
    )
    min_lr: Rate = Field(default=Rate.parse("10%"), description=_MIN_LR, examples=["10%", 3e-5])
    drop: Duration | None = Field(
        default=None,
        description="Where the rate drops to a lower curve of the same shape and end, as TriLM's does (arXiv "
        "2407.12327), counted from the start of the stage: a percentage of the stage, steps, or tokens. null: no "
        "drop.",
        examples=["50%"],
    )
    drop_to: Share = Field(
        default=Share.parse("67%"),
        description="Where the lower curve starts, as a part of the rate the stage enters with; used with `drop`.",
        examples=["67%"],
    )


ScheduleConfig = Annotated[
    ConstantSchedule
    | LinearSchedule
    | CosineSchedule
    | RexSchedule
    | TrilmSchedule
    | WsdSchedule
    | WsdSSchedule
    | InfiniteSchedule
    | RewarmedCosineSchedule
    | AnnealSchedule,
    Field(discriminator="kind"),
]
