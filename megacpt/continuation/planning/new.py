"""The new streams of a stage: all of a stream or a subset, shuffled or by score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from megacpt.config import StageConfig, StreamConfig, weights_over_time
from megacpt.continuation.planning.past import Past, going_on
from megacpt.data.course import Course
from megacpt.data.plan import Curriculum, Segment, Source, StagePlan, Subset
from megacpt.data.stream import TokenStream
from megacpt.data.tokenizer import Tokenizer
from megacpt.errors import ConfigError


@dataclass(frozen=True)
class OpenStream:
    """A stream that a stage reads, with what its settings say about it."""

    name: str
    settings: StreamConfig
    stream: TokenStream

    def windows(self, length: int) -> int:
        """How many samples of `length` tokens the stream has."""
        return (self.stream.tokens - 1) // length


def open_mixture(stage: StageConfig, tokenizer: Tokenizer) -> list[OpenStream]:
    """Open the streams of a stage's mixture that have a weight at some time.

    Raises:
        DataError: if one is missing, damaged, or of another tokenizer.
    """
    over_time = weights_over_time({name: stream.weight for name, stream in stage.mixture.items()}, stage.phases)
    return [
        OpenStream(name, stream, TokenStream.open(stream.path, tokenizer=tokenizer))
        for name, stream in stage.mixture.items()
        if any(weights[name] > 0 for weights in over_time)
    ]


def new_sources(streams: Sequence[OpenStream], past: Past, seed: int, length: int) -> list[Source]:
    """Return the sources of new samples; they have no shares yet, and those read in epochs no subset.

    Raises:
        ConfigError: if a subset is larger than its stream, or too small; if two names mean the same samples.
    """
    found: list[Source] = []
    for opened in streams:
        name, settings = opened.name, opened.settings
        subset = None
        if settings.subset is not None:
            windows = opened.windows(length)
            subset = _subset(opened, "subset", settings.subset.tokens(windows * length, 1) // length, windows)
        segment = _segment(opened, seed, length, subset, past)
        content_hash = opened.stream.meta.content_hash
        twins = [s.name for s in found if s.content_hash == content_hash and s.segments == (segment,)]
        if twins and settings.epochs is None:
            raise ConfigError(
                f"stage.mixture.{name} is the same stream as {twins[0]}, read in the same way, so that each sample "
                "would come twice: remove one of them"
            )
        path = str(Path(settings.path).resolve())
        found.append(Source(name, path, content_hash, "new", None, 0.0, (segment,)))
    return found


def in_epochs(plan: StagePlan, streams: Sequence[OpenStream], past: Past, samples: int) -> StagePlan:
    """Give streams that are read in epochs the subset that makes so many of what a stage takes of them.

    Args:
        plan: the plan, with its shares; the new sources come first.
        streams: the new streams.
        past: what the lineage has consumed.
        samples: length of the stage.

    Raises:
        ConfigError: if a stream is too short for so few epochs, or the subset for its order.
    """
    sources = list(plan.sources)
    counts = Course([source.weight for source in plan.sources], plan.phases).counts(samples)
    for i, stream in enumerate(streams):
        epochs, windows = stream.settings.epochs, stream.windows(plan.seq_length)
        spanning = stream.settings.order != "shuffled" and stream.settings.subset is None
        if (epochs is None and not spanning) or not counts[i]:
            continue
        size = ceil(counts[i] / (epochs or 1))
        if epochs is None:
            size = min(size, windows)
        subset = _subset(stream, "epochs", size, windows)
        key = sources[i].segments[0].key
        sources[i] = replace(sources[i], segments=(_segment(stream, key, plan.seq_length, subset, past),))
    return replace(plan, sources=tuple(sources))


def _subset(stream: OpenStream, key: str, size: int, windows: int) -> Subset | None:
    """Return the subset of `size` windows, or None where that is all there are."""
    if windows < 1:  # what opens it for reading says so
        return None
    where = f"stage.mixture.{stream.name}.{key}"
    if size > windows:
        raise ConfigError(
            f"{where}: {getattr(stream.settings, key)} would take {size:,} samples, but {stream.stream.folder} has "
            f"{windows:,}: " + ("take less of it" if key == "subset" else "read it more often, or give it less weight")
        )
    if size < 1:
        raise ConfigError(f"{where}: {getattr(stream.settings, key)} is less than one sample: take more")
    return None if size == windows else Subset(size, stream.settings.select)


def _segment(stream: OpenStream, seed: int, length: int, subset: Subset | None, past: Past) -> Segment:
    """Return the open segment that reads a stream as its settings say, from where that was left."""
    order, parts = stream.settings.order, stream.settings.parts
    curriculum = None
    if order != "shuffled":
        windows = stream.windows(length) if subset is None else subset.windows
        if parts > windows:
            raise ConfigError(
                f"stage.mixture.{stream.name}.parts: {parts} are more than the {windows:,} samples that the order "
                f"visits: take at most {windows:,}"
            )
        curriculum = Curriculum(order, parts)
    before = past.get(stream.stream.meta.content_hash)
    segment = Segment(seed, length, 0, None, subset, curriculum)
    return going_on(segment, () if before is None else before.segments)
