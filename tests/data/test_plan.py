from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megacpt.data.plan import Curriculum, Phase, Segment, Source, StagePlan, Subset
from megacpt.errors import DataError

OPEN, CLOSED = Segment(1, 256, 10, None), Segment(1, 256, 0, 10)
NEW = Source("python", "data/python", "ab" * 32, "new", None, 0.75, (OPEN,))
SEEN = Source("english", "data/english", "cd" * 32, "replay", "seen", 0.25, (CLOSED, Segment(2, 512, 5, 7)))
PLAN = StagePlan(256, 2**62, (NEW, SEEN))
CHOSEN = replace(NEW, segments=(replace(OPEN, subset=Subset(7, "best"), curriculum=Curriculum("cyclical", 3)),))
KEPT = replace(SEEN, policy="reservoir", threshold=2**64)
FULL = replace(PLAN, sources=(CHOSEN, KEPT), phases=(Phase(5, (1.0, 3.0)), Phase(9, (1.0, 0.0), 4)))


@pytest.mark.parametrize("plan", [PLAN, FULL])
def test_a_plan_survives_json(plan: StagePlan) -> None:
    assert StagePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.pop("key"), "missing or unknown keys in StagePlan: key"),
        (lambda plan: plan["sources"][0].update(wieght=1), "missing or unknown keys in Source: wieght"),
        (
            lambda plan: plan["sources"][1]["segments"][0].pop("start"),
            "missing or unknown keys in Segment: start",
        ),
    ],
)
def test_plans_of_another_form_are_refused(change, message: str) -> None:
    content = json.loads(json.dumps(PLAN.to_dict()))
    change(content)
    with pytest.raises(DataError, match=message):
        StagePlan.from_dict(content)


@pytest.mark.parametrize(
    ("role", "policy", "segments", "message"),
    [
        ("new", "seen", (CLOSED,), "role 'new' with policy 'seen' is not possible"),
        ("replay", None, (OPEN,), "role 'replay' with policy None is not possible"),
        ("replay", "seen", (OPEN,), "seen replay needs segments with a count"),
        ("replay", "fresh", (CLOSED,), "needs exactly one segment without a count"),
        ("new", None, (), "needs exactly one segment without a count"),
        ("new", None, (OPEN, OPEN), "needs exactly one segment without a count"),
    ],
)
def test_impossible_sources_are_refused(role, policy, segments, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Source("english", "data/english", "cd" * 32, role, policy, 1.0, segments)


@pytest.mark.parametrize("numbers", [(0, 0, None), (8, -1, None), (8, 0, -1)])
def test_impossible_segments_are_refused(numbers) -> None:
    with pytest.raises(DataError, match="a segment needs seq_length >= 1"):
        Segment(1, *numbers)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Subset(0), "a subset needs at least one window"),
        (lambda: Curriculum("ascending", 0), "a curriculum needs at least one part"),
        (lambda: Phase(-1, (1.0,)), "a phase needs start >= 0"),
        (lambda: replace(PLAN, phases=(Phase(5, (1.0,)),)), "a share for each of 2 sources"),
        (lambda: replace(PLAN, phases=(Phase(5, (1, 1)), Phase(5, (1, 1)))), "phases need rising starts"),
        (lambda: replace(KEPT, threshold=None), "a reservoir has a threshold"),
        (lambda: replace(SEEN, threshold=5), "a reservoir has a threshold"),
    ],
)
def test_impossible_parts_are_refused(make, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()
