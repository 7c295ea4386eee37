"""Sources of every kind in one stage: subsets, replay of all policies, and shares that change on the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from megacpt.data.plan import Phase, Segment, StagePlan, Subset
from megacpt.data.reservoir import reservoir_threshold
from megacpt.data.stage_data import Location, StageData
from megacpt.data.stream import TokenStream
from tests.data.test_stage_data import LENGTH, new, plan, seen, streams

__all__ = ["streams"]  # the fixture


def everything(streams: dict[str, TokenStream]) -> StagePlan:
    """A plan with a source of every kind, and phases."""
    consumed = (Segment(7, LENGTH, 0, 30), Segment(7, 2 * LENGTH, 3, 9), Segment(7, LENGTH, 2, 8, Subset(20)))
    past = {streams["a"].meta.content_hash: consumed}
    sources = (
        replace(new(streams["b"]), segments=(Segment(7, LENGTH, 5, None, Subset(11)),)),
        seen(streams["a"], *consumed, weight=0.3),
        replace(seen(streams["a"], *consumed), policy="power_law", weight=0.2),
        replace(seen(streams["a"], *consumed), policy="reservoir", threshold=reservoir_threshold(past, 20 * LENGTH)),
        replace(new(streams["a"], start=40), role="replay", policy="external", weight=0.1),
    )
    phases = (Phase(50, (1, 1, 1, 1, 1), 40), Phase(120, (0.5, 0, 0.2, 0.2, 0.1)))
    return StagePlan(LENGTH, 3, sources, phases)


def test_many_at_once_are_the_same_as_one_by_one(streams) -> None:
    data = StageData(everything(streams))
    g = np.random.default_rng(1).permutation(400)
    sources, offsets = data.locate_many(g)
    assert [Location(s, o) for s, o in zip(sources.tolist(), offsets.tolist(), strict=True)] == [
        data.locate(int(at)) for at in g
    ]
    assert (data.gather(g) == np.stack([data.tokens(int(at)) for at in g])).all()
    assert (data.batch(7, 90) == np.stack([data.tokens(at) for at in range(7, 97)])).all()
    assert data.batch(7, 0).shape == (0, LENGTH + 1)
    assert data.counts(400) == tuple(int((sources == i).sum()) for i in range(5))


def test_in_an_epoch_a_source_gives_each_of_its_distinct_samples_once(streams) -> None:
    data = StageData(replace(everything(streams), phases=()))
    sources, offsets = data.locate_many(np.arange(4000))
    for source in range(5):
        count = data.distinct(source)
        # Where a source goes on in the middle of an epoch, the next one begins after its rest.
        rest = -data.plan.sources[source].segments[0].start % count if source in (0, 4) else 0
        drawn = offsets[sources == source].tolist()[rest:]
        assert len(drawn) >= 2 * count
        assert Counter(drawn[:count]) == Counter(drawn[count : 2 * count])
    assert data.distinct(0) == len(set(offsets[sources == 0].tolist())) == 11
    assert data.distinct(1) == 30 + 9 * 2 + 8
    assert data.distinct(4) == (streams["a"].tokens - 1) // LENGTH


def test_power_law_reads_like_seen(streams) -> None:
    one, other = (
        StageData(plan(replace(seen(streams["a"], Segment(7, LENGTH, 0, 30)), policy=policy)))
        for policy in ("seen", "power_law")
    )
    assert [one.locate(g) for g in range(90)] == [other.locate(g) for g in range(90)]


def test_a_phase_that_is_added_on_the_way_leaves_the_past_as_it_was(streams) -> None:
    before = StageData(plan(new(streams["a"], 0.75), new(streams["b"], 0.25)))
    after = before.with_phases((Phase(60, (0.5, 0.5)),))
    assert [after.locate(g) for g in range(60)] == [before.locate(g) for g in range(60)]
    assert abs(after.counts(1060)[1] - 15 - 500) <= 1
    assert after.streams is before.streams
    assert StageData(after.plan).locate(999) == after.locate(999)
    sources, offsets = after.locate_many(np.arange(300))
    for source in (0, 1):
        # Samples of a stream go on across the phase: none is left out, none comes early.
        alone = StageData(plan(new(streams["ab"[source]])))
        found = offsets[sources == source]
        assert found.tolist() == [alone.locate(i).offset for i in range(len(found))]


def test_a_subset_visits_its_windows_again_and_again(streams) -> None:
    source = replace(new(streams["a"]), segments=(Segment(7, LENGTH, 0, None, Subset(10)),))
    data = StageData(plan(source))
    epochs = [[data.locate(e * 10 + i).offset for i in range(10)] for e in range(3)]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len(set(epochs[0])) == 10
    # Replay of it draws the same windows.
    again = StageData(plan(seen(streams["a"], Segment(7, LENGTH, 0, 10, Subset(10)))))
    assert sorted(again.locate(i).offset for i in range(10)) == sorted(epochs[0])
