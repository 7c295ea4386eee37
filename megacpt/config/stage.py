"""A stage: what a stretch of a run is trained on, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megacpt.config.base import LocalPath, Number, Problem, Section, StageName, StreamName, raise_problems
from megacpt.config.quantities import Share, Tokens


class StreamConfig(Section):
    """One token stream of a mixture."""

    path: LocalPath = Field(
        description="Folder of the token stream (it holds stream.json), relative to where the command is run.",
        examples=["data/english"],
    )
    weight: Number = Field(
        default=1.0,
        ge=0,
        description="Weight of this stream among the new streams of the stage; weights are divided by their "
        "sum, so 3 and 1 mean three samples of four and one of four. 0 leaves the stream out.",
        examples=[1.0, 3],
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
    policy: Literal["seen", "fresh"] = Field(
        default="seen",
        description="Which old samples: seen takes only samples that the lineage has already been trained "
        "on; fresh goes on in the old streams where their stage stopped.",
        examples=["seen"],
    )


def _short_stream(value: Any) -> Any:
    # `english: data/english` is short for `english: {path: data/english}`.
    return {"path": value} if isinstance(value, str) else value


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
    mixture: dict[StreamName, Annotated[StreamConfig, BeforeValidator(_short_stream)]] = Field(
        min_length=1,
        description="The new streams of the stage by name, each with its folder and weight. `NAME: PATH` is "
        "short for `NAME: {path: PATH, weight: 1}`.",
        examples=["{english: data/english}"],
    )
    replay: ReplayConfig = Field(default_factory=ReplayConfig, description="Samples from streams of earlier stages.")

    @model_validator(mode="after")
    def _shares(self) -> StageConfig:
        raise_problems(list(self._share_problems()))
        return self

    def _share_problems(self) -> Iterator[Problem]:
        if not sum(stream.weight for stream in self.mixture.values()) > 0:
            yield Problem("mixture", "all weights are 0: give at least one stream a weight above 0")
        if self.replay.share >= 1:
            yield Problem("replay.share", "at 100% the stage would see nothing new: take less, such as 25%")
