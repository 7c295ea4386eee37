"""What a stage will read more than once, said before it starts."""

from __future__ import annotations

from collections.abc import Iterator

from megacpt.config import RunConfig
from megacpt.continuation.planning.past import Past, same_order
from megacpt.data.plan import DRAWN, Source
from megacpt.data.stage_data import StageData


def repetitions(config: RunConfig, past: Past, data: StageData) -> Iterator[str]:
    """Yield a warning, with numbers, for every source that gives a sample twice and was not asked to.

    Args:
        config: the run of the stage.
        past: what the lineage has consumed before.
        data: its samples; a controller may still change how many come from each source.
    """
    plan = data.plan
    counts = data.counts(config.stage_steps * config.batch.sequences)
    asked = {name for name, stream in config.stage.mixture.items() if stream.epochs is not None and stream.epochs > 1}
    for i, (source, count) in enumerate(zip(plan.sources, counts, strict=True)):
        distinct = data.distinct(i)
        if source.policy in DRAWN:
            if count > distinct:
                what = "in the reservoir" if source.policy == "reservoir" else "that were seen"
                times = f"each comes {count / distinct:.2f} times"
                yield f"{source.name}: the stage replays {count:,} samples of the {distinct:,} {what}: {times}"
            continue
        start = source.segments[0].start
        yield from _read_otherwise(source, past)
        if start + count > distinct and (source.name not in asked or source.role != "new"):
            went = f"{start:,} of them were read before, and " if start else ""
            yield (
                f"{source.name}: it has {distinct:,} samples of {plan.seq_length:,} tokens; {went}the stage takes "
                f"{count:,}: at its end each has been read {(start + count) / distinct:.2f} times"
            )


def _read_otherwise(source: Source, past: Past) -> Iterator[str]:
    """Say that a stream that was read in other samples or another order begins anew, and meets some of it again."""
    segment, before = source.segments[0], past.get(source.content_hash)
    if before is None or segment.start > 0:
        return
    others = [s for s in before.segments if not same_order(s, segment)]
    if others:
        tokens = sum((s.count or 0) * s.seq_length for s in others)
        yield (
            f"{source.name}: {tokens:,} tokens of it were read before with another sequence length, subset or order; "
            "this order begins at its start, and meets some of them again"
        )
