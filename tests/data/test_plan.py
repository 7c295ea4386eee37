from __future__ import annotations

import json

import pytest

from megacpt.data.plan import Segment, Source, StagePlan
from megacpt.errors import DataError

OPEN, CLOSED = Segment(1, 256, 10, None), Segment(1, 256, 0, 10)
NEW = Source("python", "data/python", "ab" * 32, "new", None, 0.75, (OPEN,))
SEEN = Source("english", "data/english", "cd" * 32, "replay", "seen", 0.25, (CLOSED, Segment(2, 512, 5, 7)))
PLAN = StagePlan(256, 2**62, (NEW, SEEN))


def test_a_plan_survives_json() -> None:
    assert StagePlan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN


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
