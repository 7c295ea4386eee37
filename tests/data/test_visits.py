from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpt.data.plan import Curriculum, Segment, Subset
from megacpt.data.scores import window_scores
from megacpt.data.stream import TokenStream
from megacpt.data.visits import visits
from megacpt.errors import DataError
from tests.data.conftest import write_stream

LENGTH, WINDOWS = 8, 250
keys = st.integers(0, 2**62)
subsets = st.none() | st.builds(
    Subset, windows=st.integers(1, WINDOWS), select=st.sampled_from(["random", "best", "worst"])
)
curricula = st.none() | st.builds(
    Curriculum, order=st.sampled_from(["ascending", "descending", "cyclical"]), parts=st.integers(1, 300)
)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    """A stream of 250 windows of 8 tokens, in documents of all lengths and scores."""
    lengths = [5 + i * 37 % 57 for i in range(60)]
    lengths.append(LENGTH * WINDOWS + 1 - sum(lengths))
    scores = [(i * 29 % 61) / 7 for i in range(61)]
    return write_stream(tmp_path_factory.mktemp("visits") / "s", lengths, scores)


@pytest.fixture(scope="module")
def scores(stream: TokenStream) -> np.ndarray:
    return np.concatenate(list(window_scores(stream, LENGTH)))


def epoch(stream: TokenStream, key: int, subset, curriculum, number: int = 0) -> np.ndarray:
    order = visits(Segment(key, LENGTH, 0, None, subset, curriculum), stream.meta.content_hash, stream)
    return order.window_many(number * order.windows + np.arange(order.windows))


@given(keys, subsets, curricula, st.integers(0, 10**9))
@settings(max_examples=150)
def test_an_epoch_visits_each_of_its_windows_once(stream, key, subset, curriculum, number) -> None:
    visited = epoch(stream, key, subset, curriculum, number)
    assert len(visited) == (subset.windows if subset else WINDOWS)
    assert len(set(visited.tolist())) == len(visited)
    assert 0 <= visited.min() <= visited.max() < WINDOWS
    # Every epoch has the same windows.
    assert set(epoch(stream, key, subset, curriculum).tolist()) == set(visited.tolist())


@given(keys, subsets, curricula)
@settings(max_examples=40)
def test_windows_are_found_one_by_one_as_all_at_once(stream, key, subset, curriculum) -> None:
    order = visits(Segment(key, LENGTH, 0, None, subset, curriculum), stream.meta.content_hash, stream)
    ordinals = np.arange(0, 5 * order.windows, 7)
    one_by_one = [int(order.window_many(np.array([ordinal]))[0]) for ordinal in ordinals]
    assert order.window_many(ordinals).tolist() == one_by_one


@given(keys, st.integers(1, WINDOWS), st.integers(1, WINDOWS))
@settings(max_examples=40)
def test_a_larger_random_subset_holds_a_smaller_one(stream, key, one, other) -> None:
    small, large = (set(epoch(stream, key, Subset(n), None).tolist()) for n in sorted((one, other)))
    assert small <= large


def test_random_subsets_are_uniform(stream) -> None:
    """Chi-square of 250 windows over 400 keys with 50 draws each: mean 199, deviation 20."""
    counts = np.zeros(WINDOWS)
    for key in range(400):
        counts[epoch(stream, key, Subset(50), None)] += 1
    expected = 400 * 50 / WINDOWS
    # Drawing without replacement makes it smaller, by the share that is left out.
    assert abs(((counts - expected) ** 2 / expected).sum() - 249 * 0.8) < 5 * 20


@given(keys, st.integers(1, WINDOWS))
@settings(max_examples=30)
def test_best_and_worst_go_by_score(stream, scores, key, windows) -> None:
    best, worst = (epoch(stream, key, Subset(windows, select), None) for select in ("best", "worst"))
    assert sorted(scores[best]) == sorted(scores)[-windows:]
    assert sorted(scores[worst]) == sorted(scores)[:windows]


@given(keys, subsets, st.integers(1, 300), st.sampled_from(["ascending", "descending"]))
@settings(max_examples=60)
def test_buckets_follow_each_other_by_score(stream, scores, key, subset, parts, order) -> None:
    visited = scores[epoch(stream, key, subset, Curriculum(order, parts), 3)]
    edges = [bucket * len(visited) // parts for bucket in range(parts + 1)]
    in_order = visited if order == "ascending" else visited[::-1]
    if order == "descending":
        edges = [len(visited) - edge for edge in edges[::-1]]
    buckets = [in_order[a:b] for a, b in pairwise(edges) if b > a]
    assert len({b - a for a, b in pairwise(edges)}) <= 2
    assert all(first.max() <= second.min() for first, second in pairwise(buckets))


def test_a_bucket_is_shuffled_inside_and_anew_in_each_epoch(stream, scores) -> None:
    first, second = (scores[epoch(stream, 5, None, Curriculum("ascending", 2), number)] for number in (0, 1))
    assert sorted(first[:125]) == sorted(second[:125])
    assert first.tolist() != second.tolist()
    assert first[:125].tolist() != sorted(first[:125])
    assert abs(np.corrcoef(first[:124], first[1:125])[0, 1]) < 5 / np.sqrt(124)


@given(keys, subsets, st.integers(1, 300))
@settings(max_examples=60)
def test_each_cycle_rises_over_the_whole_range(stream, scores, key, subset, parts) -> None:
    visited = scores[epoch(stream, key, subset, Curriculum("cyclical", parts), 2)]
    whole, rest = divmod(len(visited), parts)
    ranked, at = np.sort(visited), 0
    for cycle in range(parts):
        length = whole + (cycle < rest)
        rising = visited[at : at + length]
        at += length
        assert (np.diff(rising) >= 0).all()
        # Its i-th window is of the i-th group of `parts` that follow each other in rank.
        groups = [ranked[i * parts : (i + 1) * parts] for i in range(length)]
        assert all(value in group for value, group in zip(rising, groups, strict=True))


def test_cycles_are_dealt_anew_in_each_epoch(stream) -> None:
    first, second = (epoch(stream, 5, None, Curriculum("cyclical", 5), number) for number in (0, 1))
    assert set(first[:50].tolist()) != set(second[:50].tolist())


def test_keys_and_kinds_have_their_own_orders(stream) -> None:
    orders = {
        tuple(epoch(stream, key, subset, curriculum).tolist())
        for key in (1, 2)
        for subset in (None, Subset(WINDOWS), Subset(WINDOWS, "best"))
        for curriculum in (None, Curriculum("ascending", 3), Curriculum("cyclical", 3))
    }
    # A subset of all windows under a curriculum is the curriculum.
    assert len(orders) == 2 * (3 + 2)


def test_the_orders_are_fixed_for_good(stream) -> None:
    # A run that was begun with one version must go on with the next.
    kinds = [(Subset(40), None), (Subset(40, "best"), None), (None, Curriculum("descending", 4))]
    found = [epoch(stream, 1234, *kind)[:6].tolist() for kind in kinds]
    assert [*found, epoch(stream, 1234, Subset(60), Curriculum("cyclical", 4))[:6].tolist()] == FIXED_WINDOWS


FIXED_WINDOWS = [
    [12, 242, 33, 85, 51, 67],
    [185, 116, 192, 99, 17, 24],
    [107, 18, 28, 122, 6, 29],
    [242, 154, 41, 31, 200, 112],
]


def test_what_cannot_be_visited_is_refused(stream, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 250 samples of seq_length 8, fewer than the 251 of its subset"):
        epoch(stream, 1, Subset(WINDOWS + 1), None)
    plain = write_stream(tmp_path / "plain", [500])
    for subset, curriculum in ((Subset(3, "best"), None), (None, Curriculum("ascending", 2))):
        with pytest.raises(DataError, match="has no scores"):
            epoch(plain, 1, subset, curriculum)
    assert len(epoch(plain, 1, Subset(3), None)) == 3
