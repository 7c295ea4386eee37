from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpt.data.course import TREADS, Course
from megacpt.data.mixture import BLOCK, MixturePattern, whole_shares
from megacpt.data.plan import Phase
from megacpt.errors import DataError

positive = st.floats(1e-3, 1e3)
up_to_120 = st.integers(0, 120)
maybe_zero = st.one_of(st.just(0.0), positive)


@st.composite
def courses(draw, weights=positive, ramps=up_to_120) -> tuple[tuple[float, ...], list[Phase]]:
    sources = draw(st.integers(2, 7))
    shares = st.tuples(*[weights] * sources).filter(any)
    starts = sorted(draw(st.sets(st.integers(0, 400), max_size=6)))
    return draw(shares), [Phase(start, draw(shares), draw(ramps)) for start in starts]


def had(course: Course, samples: int, sources: int) -> np.ndarray:
    """Counts [samples + 1, sources] after each number of samples."""
    chosen, _ = course.locate_many(np.arange(samples))
    return np.vstack([np.zeros(sources), np.cumsum(chosen[:, None] == np.arange(sources), axis=0)])


def due(weights: Sequence[float], phases: Sequence[Phase], samples: int) -> np.ndarray:
    """What the shares, in steps of 1/BLOCK, come to after each number of samples: [samples + 1, sources]."""
    shares = np.tile(np.array(whole_shares(weights)) / sum(whole_shares(weights)), (samples, 1))
    for phase in phases:
        shares[phase.start :] = np.array(whole_shares(phase.shares)) / sum(whole_shares(phase.shares))
    return np.vstack([np.zeros(len(weights)), np.cumsum(shares, axis=0)])


def line(weights: Sequence[float], phases: Sequence[Phase], samples: int) -> np.ndarray:
    """What the shares come to with straight ramps, by adding up the share in the middle of every sample."""
    now = np.array(weights) / np.sum(weights)
    shares = np.tile(now, (samples, 1))
    for phase in phases:
        target = np.array(phase.shares) / np.sum(phase.shares)
        middles = np.arange(samples - phase.start) + 0.5
        climbed = np.minimum(middles / phase.ramp, 1.0) if phase.ramp else np.ones(len(middles))
        reached = shares[phase.start - 1] if phase.start else now
        shares[phase.start :] = reached + climbed[:, None] * (target - reached)
    return np.vstack([np.zeros(len(now)), np.cumsum(shares, axis=0)])


@given(courses(ramps=st.just(0)))
@settings(max_examples=40)
def test_no_source_is_a_sample_ahead_however_often_shares_change(course) -> None:
    weights, phases = course
    beyond = had(Course(weights, phases), 600, len(weights)) - due(weights, phases, 600)
    assert beyond.max() < 1
    # What is behind is what the others are ahead, so that it does not add up either.
    assert beyond.min() > 1 - len(weights)
    if len(weights) == 2:
        assert np.abs(beyond).max() < 0.5 + 1e-4


@given(courses(ramps=st.just(0)))
@settings(max_examples=40)
def test_in_each_phase_alone_two_sources_have_their_shares_to_within_one_sample(course) -> None:
    weights, phases = (course[0][:2], [Phase(p.start, p.shares[:2]) for p in course[1]])
    counts = had(Course(weights, phases), 600, 2)
    for phase, following in zip_longest(phases, phases[1:], fillvalue=Phase(600, (1, 1))):
        end = following.start
        share = np.array(whole_shares(phase.shares)) / sum(whole_shares(phase.shares))
        steps = np.arange(end - phase.start + 1)[:, None]
        assert np.abs(counts[phase.start : end + 1] - counts[phase.start] - steps * share).max() < 1 + 1e-4


@given(courses())
@settings(max_examples=40)
def test_ramps_follow_the_straight_line(course) -> None:
    weights, phases = course
    beyond = had(Course(weights, phases), 700, len(weights)) - line(weights, phases, 700)
    # Half a tread lies off the line, shares are rounded to 1/BLOCK, and a trace of weight counts as 1/BLOCK.
    off = max((phase.ramp / TREADS / 8 for phase in phases), default=0) + 700 * 2 / BLOCK
    assert beyond.max() < 1 + off
    assert beyond.min() > 1 - len(weights) - off * len(weights)


@pytest.mark.parametrize("ramp", [1, 31, 32, 1000, 10**6 + 7, 10**9])
def test_at_the_end_of_a_ramp_the_counts_are_those_of_the_straight_line(ramp: int) -> None:
    course = Course([0.95, 0.04, 0.01], [Phase(1000, (0.5, 0.3, 0.2), ramp)])
    gone = np.array(course.counts(1000 + ramp)) - np.array(course.counts(1000))
    middle = ramp * np.array([0.725, 0.17, 0.105])
    # Only the rounding of the last tread is left over: those before were made up for.
    assert np.abs(gone - middle).max() < 2 + ramp / TREADS / BLOCK


def test_a_ramp_that_is_cut_short_leaves_the_share_where_it_was() -> None:
    course = Course([1, 0], [Phase(0, (0, 1), 1000), Phase(500, (1, 1), 1000)])
    assert abs(course.counts(500)[1] - 125) <= 1
    # From a half to a half: nothing is left to climb.
    assert abs(course.counts(1500)[1] - 625) <= 1


@given(courses(weights=maybe_zero))
@settings(max_examples=40)
def test_a_share_of_zero_is_exactly_that(course) -> None:
    weights, phases = course
    phases = [Phase(phase.start, phase.shares) for phase in phases]
    chosen, _ = Course(weights, phases).locate_many(np.arange(600))
    shares = np.tile(weights, (600, 1))
    for phase in phases:
        shares[phase.start :] = phase.shares
    assert (shares[np.arange(600), chosen] > 0).all()


@given(courses(weights=maybe_zero), st.integers(0, 800), st.integers(0, 800))
@settings(max_examples=40)
def test_locating_and_counting_agree_one_by_one_and_many_at_once(course, first, last) -> None:
    weights, phases = course
    whole = Course(weights, phases)
    g = np.arange(min(first, last), max(first, last) + 1)
    sources, ordinals = whole.locate_many(g[::-1])
    located = [Course(weights, phases).locate(int(g[0])), *(whole.locate(int(at)) for at in g[1:])]
    assert list(zip(sources[::-1].tolist(), ordinals[::-1].tolist(), strict=True)) == located
    counts = list(whole.counts(int(g[0])))
    for source, ordinal in located:
        # Ordinals of a source go on across phases.
        assert ordinal == counts[source]
        counts[source] += 1
    assert tuple(counts) == whole.counts(int(g[-1]) + 1)


@given(courses(weights=maybe_zero), st.integers(0, 10**12))
@settings(max_examples=40)
def test_far_away_too(course, g) -> None:
    weights, phases = course
    whole = Course(weights, phases)
    source, ordinal = whole.locate(g)
    before, after = whole.counts(g), whole.counts(g + 1)
    assert sum(before) == g
    assert before[source] == ordinal
    assert after == tuple(count + (i == source) for i, count in enumerate(before))
    many = whole.locate_many(np.array([g]))
    assert (int(many[0][0]), int(many[1][0])) == (source, ordinal)


@given(courses(weights=maybe_zero))
@settings(max_examples=40)
def test_a_phase_that_is_added_leaves_the_past_as_it_was(course) -> None:
    weights, phases = course
    if not phases:
        return
    start = phases[-1].start
    with_it, without = (Course(weights, known).locate_many(np.arange(start)) for known in (phases, phases[:-1]))
    assert all((a == b).all() for a, b in zip(with_it, without, strict=True))


@given(st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=6).filter(any))
@settings(max_examples=20)
def test_without_phases_it_is_the_pattern_alone(weights) -> None:
    pattern, course = MixturePattern(weights), Course(weights)
    for g in (0, 1, 17, 9999, 10**4, 123_456, 10**12 + 1):
        assert course.locate(g) == pattern.locate(g)
        assert course.counts(g) == pattern.counts(g)


def test_short_phases_do_not_starve_a_rare_source() -> None:
    # Each phase has room for 0.4 samples of the last source; only what is carried over gives it any.
    phases = [Phase(80 * i, (0.7 + 0.001 * (i % 3), 0.295 - 0.001 * (i % 3), 0.005)) for i in range(1, 200)]
    assert abs(Course([0.7, 0.295, 0.005], phases).counts(80 * 200)[2] - 80) < 1


def test_ten_to_the_twelfth_samples_take_milliseconds_and_little_memory() -> None:
    phases = [Phase(10**9 * i, (1 + i % 5, 2, 7 - i % 5)) for i in range(1, 200)]
    course = Course([1, 2, 7], [*phases, Phase(10**12, (3, 2, 1.5), 10**11)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    course.locate(2 * 10**12)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10
    begin = time.process_time()
    for i in range(1000):
        course.locate(15 * 10**11 + i * 10**10)
    assert time.process_time() - begin < 0.1


def test_patterns_with_lags_are_fixed_for_good() -> None:
    # A run that was begun with one version must go on with the next.
    course = Course([3, 2, 1], [Phase(5, (1, 1, 2), 6), Phase(20, (0, 3, 1))])
    assert course.locate_many(np.arange(32))[0].tolist() == FIXED_COURSE


FIXED_COURSE = [0, 1, 0, 2, 1, 0, 0, 1, 2, 0, 2, 1, 2, 2, 0, 1, 2, 2, 0, 1, 2, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1]


def test_impossible_shares_and_samples_are_refused() -> None:
    with pytest.raises(DataError, match="mixture weights must be"):
        Course([1, 1], [Phase(5, (0, 0))])
    with pytest.raises(DataError, match="mixture weights must be"):
        Course([1, 1], [Phase(5, (2, -1))])
    for call in (Course([1]).locate, Course([1]).counts):
        with pytest.raises(ValueError, match="counted from 0"):
            call(-1)
