"""What a stage replays of earlier stages, or of streams from outside, and in which proportions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megacpt.config import ReplayConfig, RunConfig
from megacpt.continuation.ledger import Ledger
from megacpt.continuation.planning.past import Past, PastStream, going_on, lineage_seed
from megacpt.data.plan import DRAWN, Segment, Source
from megacpt.data.reservoir import reservoir_threshold, reservoir_tokens
from megacpt.data.stream import TokenStream
from megacpt.data.tokenizer import Tokenizer
from megacpt.errors import ConfigError

log = logging.getLogger(__name__)


def replay_sources(
    config: RunConfig, ledger: Ledger | None, past: Past, new: Sequence[Source], tokenizer: Tokenizer
) -> list[Source]:
    """Return the sources of replayed samples; their weights are proportions among themselves.

    Args:
        config: the run of the stage.
        ledger: what the parent has seen; None for a first stage.
        past: the same by stream.
        new: the new sources of the stage, whose streams are not replayed.
        tokenizer: the model's; streams of another are refused.

    Raises:
        ConfigError: if there is nothing to replay.
        DataError: if an external stream is missing, damaged, or of another tokenizer.
    """
    stage, length = config.stage, config.batch.seq_length
    shares = [float(stage.replay.share), *(float(phase.replay or 0) for phase in stage.phases)]
    if not any(shares) and stage.controller is None:
        return []
    if stage.replay.policy == "external":
        segment = Segment(lineage_seed(config, ledger), length, 0, None)
        return _external(stage.replay, past, new, segment, tokenizer)
    own = {source.content_hash for source in new}
    old: Past = {key: stream for key, stream in past.items() if key not in own}
    if not old:
        raise ConfigError(_nothing(ledger, past, max(shares)))
    if stage.replay.policy in DRAWN:
        old = _long_enough(old, length)
    return _of_the_lineage(stage.replay, old, past, length, {source.name for source in new})


def _long_enough(old: Past, length: int) -> Past:
    """Leave out what was consumed in shorter samples than the stage needs, and say so.

    Raises:
        ConfigError: if nothing else was consumed.
    """
    found = {}
    for key, stream in old.items():
        kept = tuple(segment for segment in stream.segments if segment.seq_length >= length)
        if kept:
            found[key] = replace(stream, segments=kept)
        if kept != stream.segments:
            short = max(segment.seq_length for segment in stream.segments if segment not in kept)
            what = "what was read of it later is replayed" if kept else "nothing of it is replayed"
            log.warning(
                "%s was read in samples of %d tokens, and the stage needs %d: %s", stream.name, short, length, what
            )
    if not found:
        raise ConfigError(
            "stage.replay.policy: all that was seen was read in samples shorter than batch.seq_length, which is "
            f"{length:,}: take policy fresh, which goes on in the old streams with samples of the new length, or a "
            "seq_length that is not larger than before"
        )
    return found


def _of_the_lineage(settings: ReplayConfig, old: Past, past: Past, length: int, taken: set[str]) -> list[Source]:
    policy, threshold = settings.policy, None
    if settings.policy == "reservoir":
        # One reservoir for all that was seen, so that a sample enters or leaves it whatever a stage replays.
        threshold = reservoir_threshold({key: stream.segments for key, stream in past.items()}, int(settings.size or 0))
    weights = _proportions(settings, old, threshold)
    found = []
    for key, stream in old.items():
        if weights[key] == 0:
            continue
        segments = (_as_before(stream, length),) if policy == "fresh" else stream.segments
        name = _free_name(stream.name, taken)
        found.append(Source(name, stream.path, key, "replay", policy, weights[key], segments, threshold))
    if not found:
        raise ConfigError(
            f"stage.replay.size: the reservoir of {int(settings.size or 0):,} tokens holds nothing of the streams that "
            f"are not in the mixture ({', '.join(stream.name for stream in old.values())}): enlarge it"
        )
    return found


def _proportions(settings: ReplayConfig, old: Past, threshold: int | None) -> Mapping[str, float]:
    """Return how much there is of each stream to replay: its tokens, by age for power_law, or those in the reservoir.

    Ibrahim et al. 2024 (arXiv 2403.08763) replay in proportion to all past tokens, replayed ones included.
    """
    if threshold is not None:
        return {key: float(reservoir_tokens(key, stream.segments, threshold)) for key, stream in old.items()}
    exponent = settings.exponent if settings.policy == "power_law" else 0.0
    return {
        key: sum(n * float(age) ** -exponent for age, n in enumerate(reversed(stream.tokens), 1))
        for key, stream in old.items()
    }


def _as_before(stream: PastStream, length: int) -> Segment:
    """Return the open segment that goes on as the stream was last read; with other samples, from their beginning."""
    last = stream.segments[-1]
    subset = last.subset
    if subset is not None and last.seq_length != length:
        subset = replace(subset, windows=max(1, subset.windows * last.seq_length // length))
    return going_on(replace(last, seq_length=length, subset=subset), stream.segments)


def _external(
    settings: ReplayConfig, past: Past, new: Sequence[Source], segment: Segment, tokenizer: Tokenizer
) -> list[Source]:
    taken = {source.name for source in new}
    own = {source.content_hash: f"stage.mixture.{source.name}" for source in new}
    found = []
    for name, given in settings.streams.items():
        if given.weight == 0:
            continue
        content_hash = TokenStream.open(given.path, tokenizer=tokenizer).meta.content_hash
        key = f"stage.replay.streams.{name}"
        if content_hash in own:
            raise ConfigError(f"{key} is the same stream as {own[content_hash]}: remove one of them")
        own[content_hash] = key
        before = past.get(content_hash)
        opened = going_on(segment, () if before is None else before.segments)
        path = str(Path(given.path).resolve())
        source_name = _free_name(name, taken)
        found.append(Source(source_name, path, content_hash, "replay", "external", given.weight, (opened,)))
    return found


def _nothing(ledger: Ledger | None, past: Past, share: float) -> str:
    if ledger is None:
        why = "this is the first stage"
    elif not past:
        why = "it is not known what the checkpoint was trained on"
    else:
        why = "the mixture holds every earlier stream already"
    ways = "set stage.replay.share=0%" if past else "set stage.replay.share=0%, or stage.replay.policy=external"
    asked = f"stage.replay.share is {share:.0%}" if share else "stage.controller sets the share of replay"
    return f"{asked}, but there is nothing to replay: {why}; {ways}"


def _free_name(name: str, taken: set[str]) -> str:
    """Return ``replay-NAME``, with a number if two old streams share a name."""
    found = f"replay-{name}"
    number = 2
    while found in taken:
        found, number = f"replay-{name}-{number}", number + 1
    taken.add(found)
    return found
