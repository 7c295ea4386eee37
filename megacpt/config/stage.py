"""A stage: what a stretch of a run is trained on, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from megacpt.config.base import Problem, Section, StageName, StreamName, raise_problems
from megacpt.config.carry import CarryConfig
from megacpt.config.mixture import (
    PhaseConfig,
    ReplayConfig,
    RetentionConfig,
    StreamConfig,
    no_entries,
    short_stream,
    weights_over_time,
)
from megacpt.config.quantities import Tokens
from megacpt.errors import nearest


class StageConfig(Section):
    """A stretch of a run on one mixture under one schedule."""

    name: StageName = Field(
        description="Name of the stage in the ledger, the lineage and the reports: letters, digits, '.', '_', '-'.",
        examples=["english"],
    )
    kind: Literal["trunk", "anneal"] = Field(
        default="trunk",
        description="trunk: a stage that later stages continue from. anneal: a release branch whose rate "
        "goes down to min_lr; it needs `schedule.kind: anneal`.",
        examples=["trunk"],
    )
    tokens: Tokens = Field(
        description="Length of the stage in tokens. It ends with the optimizer step that reaches this number.",
        examples=["20M"],
    )
    mixture: dict[StreamName, Annotated[StreamConfig, BeforeValidator(short_stream)]] = Field(
        min_length=1,
        description="The new streams of the stage by name, each with its folder and weight. `NAME: PATH` is "
        "short for `NAME: {path: PATH, weight: 1}`.",
        examples=["{english: data/english}"],
    )
    phases: Annotated[list[PhaseConfig], BeforeValidator(no_entries)] = Field(
        default_factory=list,
        description="Changes of the mixture within the stage, in the order in which they begin: each gives new "
        "weights, another share of replay, or both, at once or over a ramp.",
        examples=["[{after: 80%, replay: 10%}]"],
    )
    replay: ReplayConfig = Field(default_factory=ReplayConfig, description="Samples from streams of earlier stages.")
    carry: CarryConfig = Field(
        default_factory=CarryConfig,
        description="What of the checkpoint goes on into the stage, and as what; a first stage has none.",
    )
    controller: RetentionConfig | None = Field(
        default=None,
        description="Changes the share of replay while the stage is trained, from what the evaluations measure; what "
        "it decided is in the ledger. null: the shares are those given here.",
    )

    @model_validator(mode="after")
    def _shares(self) -> StageConfig:
        found = (self._share_problems, self._phase_problems, self._controller_problems)
        raise_problems([problem for problems in found for problem in problems()])
        return self

    def _share_problems(self) -> Iterator[Problem]:
        if not any(stream.weight > 0 for stream in self.mixture.values()):
            yield Problem("mixture", "all weights are 0: give at least one stream a weight above 0")
        shares = {"replay.share": self.replay.share, **{f"phases.{i}.replay": p.replay for i, p in self._numbered()}}
        for key, share in shares.items():
            if share is not None and share >= 1:
                yield Problem(key, "at 100% the stage would see nothing new: take less, such as 25%")

    def _phase_problems(self) -> Iterator[Problem]:
        weights = weights_over_time({name: stream.weight for name, stream in self.mixture.items()}, self.phases)
        for i, phase in self._numbered():
            for name in sorted(phase.weights.keys() - self.mixture.keys()):
                text = f"there is no such stream in stage.mixture{nearest(name, self.mixture)}; add it there, weight 0"
                yield Problem(f"phases.{i}.weights.{name}", text)
            if not phase.weights and phase.replay is None:
                yield Problem(f"phases.{i}", "nothing changes in this phase: give it weights or replay, or remove it")
            if not any(weights[i + 1].values()):
                yield Problem(f"phases.{i}.weights", "all weights are 0: leave at least one stream a weight above 0")

    def _controller_problems(self) -> Iterator[Problem]:
        control = self.controller
        if control is None:
            return
        if not control.min <= self.replay.share <= control.max:
            text = f"{self.replay.share.written} is not from stage.controller.min, {control.min.written}, to max, "
            yield Problem("replay.share", f"{text}{control.max.written}: the controller starts from it")
        for i, phase in self._numbered():
            if phase.replay is not None:
                yield Problem(f"phases.{i}.replay", "stage.controller sets the share of replay: remove one of both")

    def _numbered(self) -> Iterator[tuple[int, PhaseConfig]]:
        return iter(enumerate(self.phases))
