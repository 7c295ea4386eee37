"""The shares of a stage's sources, in every phase of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megacpt.config import RunConfig, timeline, weights_over_time
from megacpt.data.plan import Phase, StagePlan


def with_shares(config: RunConfig, plan: StagePlan, old: Sequence[float]) -> StagePlan:
    """Return `plan` with the weights of its sources and its phases.

    Args:
        config: the run: weights of the new streams, the share of replay, and the phases of both.
        plan: the new sources, then the old ones.
        old: weights of the old sources among themselves.
    """
    stage, new = config.stage, [source.name for source in plan.sources if source.role == "new"]
    weights = weights_over_time({name: stream.weight for name, stream in stage.mixture.items()}, stage.phases)
    replayed = [float(stage.replay.share)]
    for phase in stage.phases:
        replayed.append(replayed[-1] if phase.replay is None else float(phase.replay))
    first, *later = (_shares(own, new, share, old) for own, share in zip(weights, replayed, strict=True))
    times = timeline(stage.phases, stage.tokens, config.tokens_per_step, config.batch.seq_length)
    return replace(
        plan,
        sources=tuple(replace(source, weight=share) for source, share in zip(plan.sources, first, strict=True)),
        phases=tuple(Phase(start, shares, ramp) for (start, ramp), shares in zip(times, later, strict=True)),
    )


def _shares(
    weights: Mapping[str, float], new: Sequence[str], replayed: float, old: Sequence[float]
) -> tuple[float, ...]:
    whole = sum(weights[name] for name in new)
    return (
        *((1.0 - replayed) * weights[name] / whole for name in new),
        *(replayed * weight / sum(old) for weight in old),
    )


def with_replay(plan: StagePlan, start: int, share: float, old: Sequence[float]) -> StagePlan:
    """Return `plan` with another share of replay from sample `start` on, in later phases too.

    The new streams keep their proportions. A ramp that is on its way at `start` goes on from what it has reached, to
    its end under the new share.

    Args:
        plan: the new sources, then the old ones.
        start: behind all samples that are consumed.
        share: part of the samples that are replayed.
        old: weights of the old sources among themselves.
    """
    before = [phase for phase in plan.phases if phase.start < start]
    shares, ramp_end = tuple(source.weight for source in plan.sources), 0
    if before:
        shares, ramp_end = before[-1].shares, before[-1].start + before[-1].ramp
    found = [*before, Phase(start, shares, max(0, ramp_end - start))]
    for phase in plan.phases[len(before) :]:
        if phase.start == start:
            found.pop()
        found.append(phase)
    changed = (replace(p, shares=_replaced(p.shares, share, old)) for p in found[len(before) :])
    return replace(plan, phases=(*before, *changed))


def _replaced(shares: Sequence[float], share: float, old: Sequence[float]) -> tuple[float, ...]:
    """Return `shares` with another part for the old sources, which come last; the new ones keep their proportions."""
    new = shares[: len(shares) - len(old)]
    return (*(part / sum(new) * (1.0 - share) for part in new), *(share * weight / sum(old) for weight in old))
