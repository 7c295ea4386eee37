"""From a stage's mixture and the ledger to the plan of its samples."""

from __future__ import annotations

from pathlib import Path

from megacpt.config import RunConfig
from megacpt.continuation.ledger import Ledger
from megacpt.data.order import derive_key
from megacpt.data.plan import Segment, Source, StagePlan
from megacpt.data.stream import TokenStream
from megacpt.data.tokenizer import Tokenizer
from megacpt.errors import ConfigError


def plan_stage(config: RunConfig, ledger: Ledger | None, tokenizer: Tokenizer) -> StagePlan:
    """Decide which stretches of which streams a stage reads, and in which shares.

    A stream that the lineage has read before goes on where it stopped. Replay draws from the streams of earlier
    stages that are not in the stage's own mixture, in proportion to what was consumed of each.

    Args:
        config: the run of the stage.
        ledger: what the parent has seen; None for a first stage.
        tokenizer: the model's; streams of another are refused.

    Raises:
        ConfigError: if replay is asked for, and there is nothing to replay.
        DataError: if a stream is missing, damaged, or of another tokenizer.
    """
    seed = config.seed if ledger is None else ledger.stages[0].seed
    length = config.batch.seq_length
    consumed = {} if ledger is None else ledger.consumed_segments()
    chosen = {name: stream for name, stream in config.stage.mixture.items() if stream.weight > 0}
    whole = sum(stream.weight for stream in chosen.values())
    replay = float(config.stage.replay.share)

    new = []
    for name, stream in chosen.items():
        meta = TokenStream.open(stream.path, tokenizer=tokenizer).meta
        _, segments = consumed.get(meta.content_hash, (None, []))
        share = (1.0 - replay) * stream.weight / whole
        path = str(Path(stream.path).resolve())
        segment = _next_segment(seed, length, segments)
        new.append(Source(name, path, meta.content_hash, "new", None, share, (segment,)))
    if replay == 0:
        return StagePlan(length, seed, tuple(new))

    own = {source.content_hash for source in new}
    old = {key: entry for key, entry in consumed.items() if key not in own}
    if not old:
        raise ConfigError(
            f"stage.replay.share is {replay:.0%}, but there is nothing to replay: "
            + ("this is the first stage" if ledger is None else "the mixture holds every earlier stream already")
            + "; set stage.replay.share=0%"
        )
    policy = config.stage.replay.policy
    amounts = {key: sum((s.count or 0) * s.seq_length for s in segments) for key, (_, segments) in old.items()}
    names = {source.name for source in new}
    replayed = []
    for key, (source, segments) in old.items():
        share = replay * amounts[key] / sum(amounts.values())
        kept = tuple(segments) if policy == "seen" else (_next_segment(seed, length, segments),)
        name = _free_name(f"{source.name.removeprefix('replay-')}", names)
        replayed.append(Source(name, source.path, key, "replay", policy, share, kept))
    stage_number = 0 if ledger is None else len(ledger.stages)
    return StagePlan(length, derive_key(seed, "replay", stage_number), (*new, *replayed))


def _next_segment(seed: int, length: int, consumed: list[Segment]) -> Segment:
    """Return the open segment that goes on behind what was consumed with samples of the same length."""
    ends = [s.start + (s.count or 0) for s in consumed if s.seq_length == length and s.key == seed]
    return Segment(key=seed, seq_length=length, start=max(ends, default=0), count=None)


def _free_name(name: str, taken: set[str]) -> str:
    """Return ``replay-NAME``, with a number if two old streams share a name."""
    found = f"replay-{name}"
    number = 2
    while found in taken:
        found, number = f"replay-{name}-{number}", number + 1
    taken.add(found)
    return found
