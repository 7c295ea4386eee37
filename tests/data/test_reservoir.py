from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpt.data import reservoir
from megacpt.data.plan import Curriculum, Segment, Source, StagePlan, Subset
from megacpt.data.reservoir import EVERYTHING, reservoir_ordinals, reservoir_threshold, reservoir_tokens
from megacpt.data.stage_data import StageData
from megacpt.errors import DataError
from tests.data.conftest import write_stream

A, B = "a" * 64, "b" * 64
Consumed = dict[str, list[Segment]]
segments = st.builds(
    Segment,
    key=st.just(7),
    seq_length=st.sampled_from([8, 16]),
    start=st.integers(0, 500),
    count=st.integers(0, 300),
    subset=st.none() | st.just(Subset(900)),
)
lineages = st.fixed_dictionaries({A: st.lists(segments, max_size=3), B: st.lists(segments, max_size=3)}).filter(
    lambda consumed: any(segment.count for found in consumed.values() for segment in found)
)


def inside(consumed: Consumed, tokens: int) -> set[tuple[str, Segment, int]]:
    threshold = reservoir_threshold(consumed, tokens)
    return {
        (stream, replace(segment, start=0, count=0), segment.start + int(ordinal))
        for stream, found in consumed.items()
        for segment in found
        for ordinal in reservoir_ordinals(stream, segment, threshold)
    }


@given(lineages, st.integers(16, 20_000))
@settings(max_examples=60)
def test_a_reservoir_is_full_and_not_overfull(consumed: Consumed, tokens: int) -> None:
    threshold = reservoir_threshold(consumed, tokens)
    held = sum(reservoir_tokens(stream, found, threshold) for stream, found in consumed.items())
    everything = sum(s.count * s.seq_length for found in consumed.values() for s in found)
    assert held <= tokens
    assert held == everything if everything <= tokens else held > tokens - 16 * (1 + 3)


@given(lineages, st.integers(0, 300), st.integers(16, 20_000), st.integers(0, 5000))
@settings(max_examples=60)
def test_samples_enter_at_their_turn_or_never_and_larger_reservoirs_hold_smaller(consumed, more, tokens, extra) -> None:
    before = inside(consumed, tokens)
    assert before <= inside(consumed, tokens + extra)
    later = {**consumed, A: [*consumed[A], Segment(7, 8, 10_000, more)]}
    # What was outside stays outside; what comes is new.
    assert {item for item in inside(later, tokens) if item[2] < 10_000} <= before


@given(st.integers(0, 2**62), st.integers(1, 2000), st.integers(8, 9000))
@settings(max_examples=40)
def test_it_does_not_matter_how_a_stretch_is_cut_or_computed(key: int, count: int, tokens: int) -> None:
    whole, cut = [Segment(key, 8, 5, count)], [Segment(key, 8, 5, count // 3)]
    cut.append(Segment(key, 8, 5 + count // 3, count - count // 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reservoir, "_CHUNK", 37)
        parts = inside({A: cut}, tokens)
    assert inside({A: whole}, tokens) == parts


@pytest.mark.parametrize("size", [40, 200])
def test_every_consumed_sample_is_as_likely_wherever_it_stands(size: int) -> None:
    """Chi-square of 400 samples over 800 lineages: mean 399 (1 - size / 400), as they are drawn without return."""
    counts, seeds = np.zeros(400), 800
    for seed in range(seeds):
        consumed = {A: [Segment(seed, 8, 0, 150)], B: [Segment(seed, 8, 70, 250)]}
        threshold = reservoir_threshold(consumed, size * 8)
        counts[reservoir_ordinals(A, consumed[A][0], threshold)] += 1
        counts[150 + reservoir_ordinals(B, consumed[B][0], threshold)] += 1
    expected, left_out = seeds * size / 400, 1 - size / 400
    assert counts.sum() == seeds * size
    found = ((counts - expected) ** 2 / expected).sum() / left_out
    assert abs(found - 399) < 5 * np.sqrt(2 * 399)


def test_pairs_of_samples_are_independent() -> None:
    """How many neighbours of a sample in the reservoir are there as well: a third, for a third of all."""
    count, ordinals = 30_000, []
    for key in range(5):
        consumed = {A: [Segment(key, 8, 0, count)]}
        ordinals.append(set(reservoir_ordinals(A, consumed[A][0], reservoir_threshold(consumed, 80_000)).tolist()))
    for step in (1, 2, 64):
        shares = [sum(o + step in found for o in found) / len(found) for found in ordinals]
        assert abs(np.mean(shares) - 1 / 3) < 5 * np.sqrt(2 / 9 / 50_000)
    together = len(ordinals[0] & ordinals[1]) / 10_000
    assert abs(together - 1 / 3) < 5 * np.sqrt(2 / 9 / 10_000)


def test_orders_have_hashes_of_their_own() -> None:
    kinds = [
        Segment(1, 8, 0, 1000),
        Segment(2, 8, 0, 1000),
        Segment(1, 16, 0, 1000),
        Segment(1, 8, 0, 1000, Subset(2000)),
        Segment(1, 8, 0, 1000, None, Curriculum("ascending", 4)),
    ]
    found = {tuple(reservoir_ordinals(stream, kind, EVERYTHING // 3).tolist()) for kind in kinds for stream in (A, B)}
    assert len(found) == 10


def test_reservoirs_are_fixed_for_good() -> None:
    # A lineage that was begun with one version must go on with the next.
    consumed = {A: [Segment(1234, 8, 3, 100)], B: [Segment(1234, 16, 0, 50, Subset(60))]}
    threshold = reservoir_threshold(consumed, 100)
    assert threshold == FIXED_THRESHOLD
    assert [reservoir_ordinals(s, consumed[s][0], threshold).tolist() for s in (A, B)] == FIXED_ORDINALS


FIXED_THRESHOLD = 948459514761630750
FIXED_ORDINALS = [[2, 17, 21, 48, 55, 96], [20, 36, 46]]


def test_a_reservoir_of_nothing_or_for_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="needs consumed samples"):
        reservoir_threshold({A: [Segment(1, 8, 0, 0)]}, 100)
    with pytest.raises(DataError, match="of 7 tokens has no room for a sample of 8"):
        reservoir_threshold({A: [Segment(1, 8, 0, 10)]}, 7)


@pytest.mark.parametrize("length", [8, 4])
def test_replay_draws_each_sample_of_the_reservoir_once_before_any_twice(tmp_path: Path, length: int) -> None:
    stream = write_stream(tmp_path / "s", [3001])
    consumed = [Segment(7, 8, 0, 90), Segment(7, 8, 90, 40), Segment(7, 16, 0, 30)]
    content = stream.meta.content_hash
    threshold = reservoir_threshold({content: consumed}, 640)
    source = Source("s", str(stream.folder), content, "replay", "reservoir", 1.0, tuple(consumed), threshold)
    plan = StagePlan(length, 3, (source,))
    data = StageData(StagePlan.from_dict(plan.to_dict()))

    expected: Counter[int] = Counter()
    for segment in consumed:
        new = Source("s", str(stream.folder), content, "new", None, 1.0, (replace(segment, count=None),))
        whole = StageData(StagePlan(segment.seq_length, 3, (new,)))
        for ordinal in reservoir_ordinals(content, segment, threshold):
            begin = whole.locate(int(ordinal)).offset
            expected.update(begin + cut * length for cut in range(segment.seq_length // length))
    assert data.distinct(0) == expected.total() == reservoir_tokens(content, consumed, threshold) // length
    for epoch in range(3):
        g = epoch * data.distinct(0) + np.arange(data.distinct(0))
        assert Counter(data.locate_many(g)[1].tolist()) == expected


def test_a_source_without_a_sample_in_the_reservoir_is_refused(tmp_path: Path) -> None:
    stream = write_stream(tmp_path / "s", [300])
    segment = Segment(7, 8, 0, 2)
    source = Source("s", str(stream.folder), stream.meta.content_hash, "replay", "reservoir", 1.0, (segment,), 1)
    with pytest.raises(DataError, match="no sample of it is in the reservoir"):
        StageData(StagePlan(8, 3, (source,)))


def test_ten_million_consumed_samples_take_a_moment() -> None:
    consumed = {A: [Segment(1, 4096, 0, 10**7)]}
    threshold = reservoir_threshold(consumed, 10**9)
    assert reservoir_tokens(A, consumed[A], threshold) == 10**9 // 4096 * 4096
