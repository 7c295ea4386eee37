"""What the samples of a stage are: streams with weights, phases, replay, and what may change the shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megacpt.config.base import Count, LocalPath, Number, Problem, Section, StreamName, raise_problems
from megacpt.config.quantities import Duration, Part, Share, Tokens


def short_stream(value: Any) -> Any:
    """Read `english: data/english` as short for `english: {path: data/english}`."""
    return {"path": value} if isinstance(value, str) else value


def no_entries(value: Any) -> Any:
    """Read a list whose entries are all commented out (null in YAML) as a list without entries."""
    return [] if value is None else value


class WeightedStream(Section):
    """A token stream, and how much of it is taken beside the others."""

    path: LocalPath = Field(
        description="Folder of the token stream (it holds stream.json), relative to where the command is run.",
        examples=["data/english"],
    )
    weight: Number = Field(
        default=1.0,
        ge=0,
        description="Weight of this stream among those beside it; weights are divided by their sum, so 3 and 1 "
        "mean three samples of four and one of four. 0 leaves the stream out (until a phase gives it more).",
        examples=[1.0, 3],
    )


class StreamConfig(WeightedStream):
    """One token stream of a mixture: which of its samples are read, and in which order."""

    subset: Part | None = Field(
        default=None,
        description="How much of the stream is read, again and again where the stage takes more: a percentage of it, "
        "or tokens. null: all of it.",
        examples=["25%", "5B"],
    )
    epochs: Number | None = Field(
        default=None,
        ge=1,
        description="How many times the stage reads what it takes of the stream: a subset of the size that this needs, "
        "instead of `subset`. Several epochs on a good subset can beat one on everything (arXiv 2406.14833). null: no "
        "subset.",
        examples=[4],
    )
    select: Literal["random", "best", "worst"] = Field(
        default="random",
        description="Which samples make the subset: those drawn at random, or those of the highest (best) or lowest "
        "(worst) score. Scores come from `megacpt data prepare --score FIELD`.",
        examples=["best"],
    )
    order: Literal["shuffled", "ascending", "descending", "cyclical"] = Field(
        default="shuffled",
        description="Order of the samples: shuffled; from low to high score (ascending) or from high to low "
        "(descending); or ascending several times, each over another part of the samples (cyclical). An order by "
        "score spans the stage once (`epochs: 1`) where neither subset nor epochs is given.",
        examples=["ascending"],
    )
    parts: Count = Field(
        default=16,
        ge=1,
        description="In how many steps an order by score rises or falls: buckets of similar score, shuffled inside; "
        "or, for cyclical, the number of cycles. A shuffled order does not use it.",
        examples=[16],
    )

    @model_validator(mode="after")
    def _subset(self) -> StreamConfig:
        if self.subset is not None and self.epochs is not None:
            raise_problems(
                [Problem("epochs", "subset says already how much of the stream is read: remove one of both")]
            )
        if self.select != "random" and self.subset is None and self.epochs is None and self.order == "shuffled":
            raise_problems([Problem("select", f"the {self.select} of how much? Add a subset, such as 25%, or epochs")])
        return self


class PhaseConfig(Section):
    """A change of the mixture within a stage."""

    after: Duration = Field(
        description="Where the phase begins, counted from the start of the stage: a percentage of it, steps, or "
        "tokens.",
        examples=["80%", "5M tokens"],
    )
    weights: dict[StreamName, Annotated[Number, Field(ge=0)]] = Field(
        default_factory=dict,
        description="New weights, by stream of stage.mixture. Streams that are not named keep theirs.",
        examples=["{english: 1}"],
    )
    replay: Share | None = Field(
        default=None,
        description="New share of replay, as stage.replay.share. null: it stays.",
        examples=["10%"],
    )
    ramp: Duration | None = Field(
        default=None,
        description="Length of a linear change from the shares before to the new ones, which begins at `after`. "
        "null: at once.",
        examples=["10%"],
    )


class ReplayConfig(Section):
    """How much of the stage comes from streams of earlier stages of the lineage."""

    share: Share = Field(
        default=Share.parse("0%"),
        description="Part of the stage's samples that come from streams of earlier stages; they replace new "
        "samples, the stage does not become longer. Ibrahim et al. 2024 chose 5% for a weak shift of the "
        "data and 25% for a strong one. 0% is no replay.",
        examples=["25%"],
    )
    policy: Literal["seen", "fresh", "power_law", "reservoir", "external"] = Field(
        default="seen",
        description="Which old samples. seen: those that the lineage has been trained on; fresh: the old streams go "
        "on where they stopped; power_law: as seen, older stages less often (see exponent); reservoir: a uniform "
        "sample of all that was seen, of a fixed size (see size); external: streams from outside (see streams), for "
        "a model whose own data is not at hand.",
        examples=["seen"],
    )
    exponent: Number = Field(
        default=1.0,
        ge=0,
        description="How much less power_law replays of older stages: a token counts age^-exponent, where the age of "
        "the stage that read it is 1 for the last stage, 2 for the one before. 0 is the same as seen.",
        examples=[1.0],
    )
    size: Tokens | None = Field(
        default=None,
        description="How many tokens a reservoir holds, the same for a whole lineage. It keeps so much of all that was "
        "seen, drawn uniformly; as more is seen, samples leave it only where new ones take their place.",
        examples=["1B"],
    )
    streams: dict[StreamName, Annotated[WeightedStream, BeforeValidator(short_stream)]] = Field(
        default_factory=dict,
        description="The streams of external replay by name, each with its folder and weight, such as public data like "
        "that which a converted model was trained on.",
        examples=["{web: data/web}"],
    )

    @model_validator(mode="after")
    def _policy(self) -> ReplayConfig:
        raise_problems(list(self._policy_problems()))
        return self

    def _policy_problems(self) -> Iterator[Problem]:
        if self.policy == "reservoir" and self.size is None:
            yield Problem("size", "a reservoir needs its size in tokens, such as 1B")
        if self.policy != "reservoir" and self.size is not None:
            yield Problem("size", f"only a reservoir has a size: remove it, or set policy to reservoir ({self.policy})")
        if self.policy == "external" and not any(stream.weight > 0 for stream in self.streams.values()):
            yield Problem("streams", "external replay needs a stream with a weight above 0, such as {web: data/web}")
        if self.policy != "external" and self.streams:
            text = f"only external replay reads these: remove them, or set policy to external ({self.policy})"
            yield Problem("streams", text)


class RetentionConfig(Section):
    """A controller that replays as much as it takes to keep what earlier stages learned."""

    kind: Literal["retention"] = Field(
        default="retention",
        description="After each evaluation: more replay where the held-out streams that the stage does not train on "
        "got worse by more than the target, less where by less than half of it.",
        examples=["retention"],
    )
    target: Number = Field(
        default=0.02,
        gt=0,
        description="Rise of the held-out loss that is accepted, in bits a byte: the mean over evaluate.streams that "
        "are not in stage.mixture, against the start of the stage.",
        examples=[0.02],
    )
    step: Share = Field(
        default=Share.parse("1%"), description="How much the share of replay moves at a time.", examples=["1%"]
    )
    min: Share = Field(default=Share.parse("0%"), description="Lowest share of replay.", examples=["0%"])
    max: Share = Field(default=Share.parse("50%"), description="Highest share of replay.", examples=["50%"])

    @model_validator(mode="after")
    def _range(self) -> RetentionConfig:
        if not self.step > 0:
            raise_problems([Problem("step", "at 0% the share never moves: take more, such as 1%")])
        if not self.min < self.max:
            text = f"{self.max.written} is not above stage.controller.min, {self.min.written}"
            raise_problems([Problem("max", text)])
        if self.max >= 1:
            raise_problems([Problem("max", "at 100% the stage would see nothing new: take less, such as 50%")])
        return self


def weights_over_time(weights: Mapping[str, float], phases: list[PhaseConfig]) -> list[dict[str, float]]:
    """Return the weights of the new streams before the first phase, and in each."""
    found = [dict(weights)]
    for phase in phases:
        found.append({**found[-1], **phase.weights})
    return found


def timeline(phases: list[PhaseConfig], tokens: int, tokens_per_step: int, seq_length: int) -> list[tuple[int, int]]:
    """Return where each phase begins and how long its ramp is, both in samples, to the nearest.

    Args:
        phases: in the order in which they begin.
        tokens: of the stage.
        tokens_per_step: tokens that an optimizer step sees.
        seq_length: tokens of a sample.
    """
    found = []
    for phase in phases:
        after = phase.after.tokens(tokens, tokens_per_step)
        ramp = 0 if phase.ramp is None else phase.ramp.tokens(tokens, tokens_per_step)
        start, end = (int(Fraction(position, seq_length) + Fraction(1, 2)) for position in (after, after + ramp))
        found.append((start, end - start))
    return found


def timeline_problems(phases: list[PhaseConfig], times: list[tuple[int, int]], samples: int) -> Iterator[Problem]:
    """Yield what is wrong with the `times` of the phases (see `timeline`) of a stage of so many samples."""
    ends, before = [*(start for start, _ in times), samples][1:], -1
    for i, (phase, (start, ramp), end) in enumerate(zip(phases, times, ends, strict=True)):
        key = f"stage.phases.{i}"
        if start <= before:
            yield Problem(
                f"{key}.after", f"{phase.after} is not behind the phase before: order them by their beginning"
            )
        elif start >= samples:
            yield Problem(f"{key}.after", f"{phase.after} is not before the end of the stage ({samples:,} samples)")
        elif before < start < end < start + ramp:
            what = "the next phase begins" if i + 1 < len(phases) else "the stage ends"
            text = f"{phase.ramp} is not over when {what}, {end - start:,} samples later: make it shorter"
            yield Problem(f"{key}.ramp", text)
        before = start
