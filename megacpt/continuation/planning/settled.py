"""The mixture of a stage as it stands, for a branch that leaves the stage there."""

from __future__ import annotations

from typing import Any

from megacpt.config import RunConfig, timeline
from megacpt.continuation.ledger import StageRecord


def settled(config: RunConfig, record: StageRecord) -> dict[str, Any]:
    """Return the keys of a stage with the mixture at the end of `record`, and nothing that changes it any more.

    Phases that have begun are folded into the weights and the share of replay (a ramp counts as climbed), later ones
    left out; a controller leaves the share that it came to. Subsets stay what they are, whatever the new length.

    Args:
        config: the run of the stage.
        record: how far it came.
    """
    stage = config.stage.model_dump()
    times = timeline(config.stage.phases, config.stage.tokens, config.tokens_per_step, record.seq_length)
    for phase, (start, _) in zip(config.stage.phases, times, strict=True):
        if start * record.seq_length < record.tokens:
            for name, weight in phase.weights.items():
                stage["mixture"][name]["weight"] = weight
            if phase.replay is not None:
                stage["replay"]["share"] = phase.replay.written
    if record.controller is not None:
        stage["replay"]["share"] = record.controller["share"]
    for source in record.plan.sources:
        if source.role == "new":
            subset = source.segments[0].subset
            size = None if subset is None else f"{subset.windows * record.seq_length} tokens"
            stage["mixture"][source.name].update(epochs=None, subset=size)
    stage.update(phases=[], controller=None)
    return stage
