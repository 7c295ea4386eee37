"""What weights have seen that were made from several checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from megacpt.continuation.ledger import StageRecord


def merged_stages(lineages: Sequence[Sequence[StageRecord]]) -> tuple[StageRecord, ...]:
    """Return every stage of several lineages once, a stage before those that continue it.

    A stage that several have in common is taken as far as the one that went furthest. The last lineage's own stages
    come last, so that its current stage stays the current one.

    Args:
        lineages: stages of each, oldest first.
    """
    groups: list[list[Sequence[StageRecord]]] = []
    for stages in lineages:
        if not stages:
            continue
        position = next((i for i, (known, *_) in enumerate(groups) if known[0].is_same(stages[0])), None)
        members = [] if position is None else groups.pop(position)
        groups.append([*members, stages])  # the group of the last lineage goes to the end
    found: list[StageRecord] = []
    for members in groups:
        found.append(max((stages[0] for stages in members), key=lambda stage: stage.steps))
        found += merged_stages([stages[1:] for stages in members])
    return tuple(found)
