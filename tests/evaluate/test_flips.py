"""What a later checkpoint gets wrong that an earlier one got right, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.errors import DataError
from megacpt.evaluate.flips import Flips, Worse, compare
from megacpt.evaluate.instances import Header, Instance, record_writer


def _instance(stream: str, index: int, nats: float | None, hit: str) -> Instance:
    return Instance(stream, index, nats, np.array([mark == "x" for mark in hit]))


def _record(path: Path, *instances: Instance, **header: object) -> Path:
    streams = {instance.stream: "same" for instance in instances}
    named = {"checkpoint": path.stem, "ledger": "0123", "tokenizer": "bytes"}
    settings: dict[str, object] = {**named, "streams": streams, **header}
    with record_writer(path, Header(**settings)) as write:  # type: ignore[arg-type]
        for instance in instances:
            write(instance)
    return path


def test_by_hand(tmp_path: Path) -> None:
    before = _record(
        tmp_path / "before.jsonl",
        _instance("news", 0, 4.0, "xx.."),
        _instance("news", 3, 9.0, "x..x.x"),
        _instance("quiz:acc:none", 0, None, "x"),
        _instance("quiz:acc:none", 1, None, "."),
    )
    after = _record(
        tmp_path / "after.jsonl",
        _instance("news", 0, 6.0, "x.x."),
        _instance("news", 3, 8.0, "xxxx.."),
        _instance("quiz:acc:none", 0, None, "x"),
        _instance("quiz:acc:none", 1, None, "x"),
    )
    news, quiz = compare(before, after)
    assert (news.instances, news.predictions, news.hits_before, news.hits_after) == (2, 10, 5, 6)
    assert (news.lost, news.won) == (2, 3)
    assert (news.negative, news.positive) == (0.2, 0.3)
    assert news.relative == pytest.approx(0.2 / (0.5 * 0.4))
    assert news.worse == 0.5
    assert news.worst == [Worse(0, 1.0, 1.5)]
    assert quiz == Flips("quiz:acc:none", 2, 2, hits_before=1, hits_after=2, lost=0, won=1)
    assert quiz.relative is None
    assert quiz.worse is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_flips_are_the_change_of_accuracy(marks: list[tuple[bool, bool]]) -> None:
    was, now = (np.array(side) for side in zip(*marks, strict=True))
    flips = Flips("x")
    flips.add(Instance("x", 0, 1.0, was), Instance("x", 0, 1.0, now))
    assert flips.won - flips.lost == flips.hits_after - flips.hits_before
    assert flips.positive - flips.negative == pytest.approx(now.mean() - was.mean())
    assert flips.worse == 0


def test_only_the_worst_documents_are_kept() -> None:
    flips = Flips("x")
    for index in range(20):
        flips.add(_instance("x", index, 1.0, "x."), _instance("x", index, 1.0 + (7 * index) % 20, "x."))
    assert [worse.after for worse in flips.worst] == [10.0, 9.5, 9.0, 8.5, 8.0]
    assert flips.documents_worse == 19


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokenizer": "other"}, "other tokenizers"),
        ({"streams": {"news": "new"}}, "'news' has other content"),
        ({"streams": {}}, "'news' is not in the record of after"),
        ([_instance("news", 0, 1.0, "xx")], "after.jsonl ends early: measure both with the same --tokens"),
        (
            [_instance("news", 0, 1.0, "xx"), _instance("news", 1, 1.0, "xx")],
            r"news 1 \(1 predictions\) and news 1 \(2 predictions\)",
        ),
        (
            [_instance("news", 0, 1.0, "xx"), _instance("news", 2, 1.0, "x")],
            r"news 1 \(1 predictions\) and news 2 \(1 predictions\)",
        ),
    ],
    ids=["tokenizer", "content", "missing", "short", "tokens", "index"],
)
def test_records_of_something_else_are_refused(
    tmp_path: Path, changed: dict[str, object] | list[Instance], said: str
) -> None:
    same = [_instance("news", 0, 1.0, "xx"), _instance("news", 1, 1.0, "x")]
    before = _record(tmp_path / "before.jsonl", *same)
    rows, header = (same, changed) if isinstance(changed, dict) else (changed, {})
    after = _record(tmp_path / "after.jsonl", *rows, **header)
    with pytest.raises(DataError, match=said):
        compare(before, after)
