from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpt.data.mixture import BLOCK, LAG, MixturePattern
from megacpt.errors import DataError

weights_lists = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=8).filter(any)


def sources_of(pattern: MixturePattern, count: int) -> np.ndarray:
    return np.array([pattern.locate(g)[0] for g in range(count)])


@given(weights_lists)
@settings(max_examples=25)
def test_blocks_are_exact_and_no_prefix_is_a_sample_off(weights: list[float]) -> None:
    pattern = MixturePattern(weights)
    chosen = sources_of(pattern, pattern.block)
    counts = np.cumsum(chosen[:, None] == np.arange(len(weights)), axis=0)
    share = np.array(pattern.block_counts) / pattern.block
    assert tuple(counts[-1]) == pattern.block_counts
    assert np.abs(counts - np.arange(1, pattern.block + 1)[:, None] * share).max() < 1
    assert [count > 0 for count in pattern.block_counts] == [weight > 0 for weight in weights]


@given(weights_lists)
@settings(max_examples=40)
def test_shares_are_met_to_within_one_in_a_block(weights: list[float]) -> None:
    pattern = MixturePattern(weights)
    wanted = np.array(weights) / max(weights)
    wanted /= wanted.sum()
    # A tiny weight is rounded up to one sample, which the others give.
    raised = sum(0 < share < 1 / BLOCK for share in wanted)
    difference = np.abs(np.array(pattern.block_counts) / pattern.block - wanted)
    assert difference.max() <= (1 + raised) / BLOCK


@given(weights_lists, st.integers(0, 10**15))
@settings(max_examples=50)
def test_locate_and_counts_agree_anywhere(weights: list[float], g: int) -> None:
    pattern = MixturePattern(weights)
    before = pattern.counts(g)
    source, ordinal = pattern.locate(g)
    assert sum(before) == g
    assert ordinal == before[source]
    assert pattern.counts(g + 1)[source] == ordinal + 1


def test_ordinals_of_each_source_are_consecutive_across_blocks() -> None:
    pattern = MixturePattern([5, 3, 1])
    located = [pattern.locate(g) for g in range(5 * pattern.block)]
    for source in range(3):
        ordinals = [ordinal for found, ordinal in located if found == source]
        assert ordinals == list(range(len(ordinals)))


def test_a_quarter_of_replay_is_a_quarter_of_every_four() -> None:
    pattern = MixturePattern([0.75, 0.25])
    chosen = sources_of(pattern, 400).reshape(-1, 4)
    assert (chosen.sum(axis=1) == 1).all()
    assert pattern.counts(10**12) == (750 * 10**9, 250 * 10**9)


def test_weight_zero_never_appears() -> None:
    pattern = MixturePattern([1, 0, 1])
    assert set(sources_of(pattern, 1000)) == {0, 2}
    assert pattern.counts(1000) == (500, 0, 500)


def test_a_tiny_weight_appears() -> None:
    pattern = MixturePattern([1, 1e-12])
    assert pattern.block_counts == (BLOCK - 1, 1)


def test_decimal_shares_are_exact() -> None:
    assert MixturePattern([0.7, 0.2, 0.1]).block_counts == (7, 2, 1)
    assert MixturePattern([0.1] * 10).block_counts == (1,) * 10
    assert MixturePattern([0.95, 0.05]).block_counts == (19, 1)


def test_the_pattern_is_fixed_for_good() -> None:
    # A run that was begun with one version must go on with the next.
    assert sources_of(MixturePattern([3, 2, 1]), 12).tolist() == FIXED_PATTERN


FIXED_PATTERN = [0, 1, 0, 2, 1, 0, 0, 1, 0, 2, 1, 0]


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [float("nan")], [1, float("inf")]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="mixture weights must be"):
        MixturePattern(weights)


def test_more_sources_than_samples_in_a_block_are_refused() -> None:
    with pytest.raises(DataError, match="at most 10000 streams"):
        MixturePattern([1.0] * (BLOCK + 1))


def test_negative_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="counted from 0"):
        MixturePattern([1]).locate(-1)
    with pytest.raises(ValueError, match="counted from 0"):
        MixturePattern([1]).counts(-1)


@given(weights_lists, st.lists(st.integers(0, 10**15), max_size=20))
@settings(max_examples=25)
def test_many_at_once_are_the_same_as_one_by_one(weights: list[float], places: list[int]) -> None:
    pattern = MixturePattern(weights)
    sources, ordinals = pattern.locate_many(np.array(places, np.int64))
    assert list(zip(sources.tolist(), ordinals.tolist(), strict=True)) == [pattern.locate(g) for g in places]


def test_the_pattern_is_tijdemans() -> None:
    """Against the algorithm as it is written: at each position, the earliest deadline among what is due."""
    for weights in ([3, 2, 1], [0.75, 0.25], [0.61, 0.0, 0.2, 0.19], [5, 3, 1, 1, 1, 1]):
        pattern = MixturePattern(weights)
        share = np.array([count for count in pattern.block_counts if count])
        active, taken, slack = np.flatnonzero(pattern.block_counts), np.zeros(len(share)), 2 * len(share) - 2
        for position in range(2 * pattern.block):
            due = share * (position + 1) / pattern.block - taken >= 1 / slack - 1e-9
            deadline = np.where(due, (taken + 1 - 1 / slack) / share * pattern.block, np.inf).round(6)
            chosen = int(np.argmin(deadline))
            assert pattern.locate(position) == (active[chosen], taken[chosen])
            taken[chosen] += 1


lags_lists = st.lists(st.floats(-0.99, 0.99), min_size=2, max_size=6)


@given(lags_lists, st.data())
@settings(max_examples=40)
def test_lags_are_paid_back_and_the_rest_repeats(lags: list[float], data) -> None:
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(lags), max_size=len(lags)))
    owed = np.array([round(lag * LAG) for lag in lags])
    owed -= owed.sum() // len(lags)
    pattern = MixturePattern(weights, owed.tolist())
    chosen = sources_of(pattern, 2000)
    counts = np.cumsum(chosen[:, None] == np.arange(len(lags)), axis=0)
    due = owed / LAG + np.arange(1, 2001)[:, None] * np.array(pattern.block_counts) / pattern.block
    # Who was a sample ahead at the beginning may stay so until it is due again.
    assert (counts - due).max() < max(1, -due[0].min() + 1)
    assert np.abs(counts - due)[500:].max() < len(lags) - 1 + 1e-3
    assert np.abs(np.array(pattern.lags(1500)) / LAG - (due - counts)[1499]).max() < 1e-4
    for g in (0, 1, 700, 10**9 + 3):
        assert pattern.counts(g + 1)[pattern.locate(g)[0]] == pattern.locate(g)[1] + 1
        assert sum(pattern.counts(g)) == g


def test_what_a_source_without_weight_is_owed_passes_to_the_others() -> None:
    pattern = MixturePattern([1, 1, 0], [LAG // 2, 0, -LAG // 2])
    assert pattern.lags(0) == (LAG // 4, -LAG // 4, 0)
    assert 2 not in sources_of(pattern, 100)


def test_a_pattern_of_a_known_length_begins_like_the_endless_one() -> None:
    whole, part = (MixturePattern([0.61, 0.2, 0.19], [LAG // 3, 0, -LAG // 3], length) for length in (None, 77))
    assert [part.locate(g) for g in range(77)] == [whole.locate(g) for g in range(77)]
    assert part.counts(77) == whole.counts(77)
    assert part.lags(77) == whole.lags(77)
