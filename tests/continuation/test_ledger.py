"""The ledger: JSON there and back, an identity that follows from what was seen, and no silent change."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megacpt.continuation.ledger import LEDGER, Ledger
from megacpt.errors import CheckpointError
from tests.continuation.conftest import Finish, stage


@pytest.fixture
def ledger(english: Path, streams: dict[str, str], finish: Finish, tmp_path: Path) -> Ledger:
    """A ledger of two stages, the second with replay."""
    config = stage(tmp_path / "python", {"python": streams["python"]}, replay={"share": "25%", "policy": "seen"})
    return Ledger.read(finish(config, english))


def _changed_source(ledger: Ledger, **changes: Any) -> Ledger:
    first, *rest = ledger.stage.plan.sources
    sources = (replace(first, **changes), *rest)
    return ledger.with_stage(plan=replace(ledger.stage.plan, sources=sources))


def test_there_and_back(ledger: Ledger) -> None:
    again = Ledger.from_json(ledger.to_json())
    assert again == ledger
    assert again.id == ledger.id
    assert json.loads(ledger.to_json())["id"] == ledger.id
    assert Ledger.from_json(json.dumps(json.loads(ledger.to_json()), sort_keys=True)) == ledger


@pytest.mark.parametrize(
    "change",
    [
        lambda b: replace(b, parent_path="/elsewhere"),
        lambda b: b.with_stage(run="/moved"),
        lambda b: b.with_stage(layouts=("tp2 pp1 cp1 dp1", "tp1 pp1 cp1 dp4")),
        lambda b: b.with_stage(seconds=9.0),
        lambda b: b.with_stage(versions={"torch": "9"}),
        lambda b: _changed_source(b, path="/other/disk"),
        lambda b: replace(b, tokenizer={**b.tokenizer, "spec": "/other/tokenizer"}),
    ],
    ids=["parent path", "run", "layouts", "seconds", "versions", "stream path", "tokenizer path"],
)
def test_where_and_how_fast_it_ran_is_not_its_identity(ledger: Ledger, change: Callable[[Ledger], Ledger]) -> None:
    assert change(ledger) != ledger
    assert change(ledger).id == ledger.id


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.with_stage(steps=3),
        lambda b: b.with_stage(tokens=3),
        lambda b: b.with_stage(seed=6),
        lambda b: b.with_stage(batch=4),
        lambda b: b.with_stage(precision="bfloat16"),
        lambda b: b.with_stage(consumed={"python": 1}),
        lambda b: b.with_stage(schedule={**b.stage.schedule, "peak": 1.0}),
        lambda b: b.with_stage(optimizer={**b.stage.optimizer, "beta2": 0.5}),
        lambda b: b.with_stage(plan=replace(b.stage.plan, key=1)),
        lambda b: _changed_source(b, content_hash="0" * 64),
        lambda b: _changed_source(b, weight=0.5),
        lambda b: replace(b, parent="0" * 12),
        lambda b: replace(b, model={**b.model, "layers": 3}),
        lambda b: replace(b, tokenizer={**b.tokenizer, "fingerprint": "0"}),
        lambda b: replace(b, stages=b.stages[1:]),
    ],
)
def test_what_was_seen_is(ledger: Ledger, change: Callable[[Ledger], Ledger]) -> None:
    assert change(ledger).id != ledger.id


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tampering_is_found(ledger: Ledger, data: st.DataObject) -> None:
    """Whatever leaf of the JSON is changed: the ledger is refused, or its identity did not depend on it."""
    content = json.loads(ledger.to_json())
    node: Any = content
    trail: list[Any] = []
    while isinstance(node, dict | list) and node:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
        trail.append(key)
        holder, node = node, node[key]
    other: Any = data.draw(st.integers(0, 9) | st.text(max_size=3) | st.none() | st.just([]) | st.just({}))
    holder[trail[-1]] = other
    volatile = {"parent_path", "run", "layouts", "versions", "seconds", "path", "spec"}
    if other == node or set(map(str, trail)) & volatile:
        with suppress(CheckpointError):  # such as a layout that is no list
            assert Ledger.from_json(json.dumps(content), "x/ledger.json").id == ledger.id
    else:
        with pytest.raises(CheckpointError, match=r"x/ledger\.json"):
            Ledger.from_json(json.dumps(content), "x/ledger.json")


def test_changing_it_by_hand_is_refused(english: Path) -> None:
    path = english / LEDGER
    content = json.loads(path.read_text())
    content["stages"][0]["consumed"]["english"] += 128
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"ledger\.json was changed after it was written: its id is"):
        Ledger.read(english)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"null",
        b"\xff\xfe\x00",
        b"{}",
        b'{"format": 2}',
        b'{"format": 1, "id": "x", "stages": []}',
    ],
)
def test_what_is_no_ledger(english: Path, content: bytes) -> None:
    (english / LEDGER).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ledger\.json"):
        Ledger.read(english)
    (english / LEDGER).unlink()
    with pytest.raises(CheckpointError, match=r"ledger\.json cannot be read: No such file"):
        Ledger.read(english)


def test_an_unknown_or_missing_key_is_named(ledger: Ledger) -> None:
    content = json.loads(ledger.to_json())
    content["stages"][1]["colour"] = content["stages"][1].pop("seed")
    with pytest.raises(CheckpointError, match=r"missing or unknown keys of a stage: colour, seed"):
        Ledger.from_json(json.dumps(content))
    content = json.loads(ledger.to_json())
    content["stages"][1]["plan"]["sources"][0]["colour"] = 1
    with pytest.raises(CheckpointError, match=r"here\.json is no ledger: .*colour"):
        Ledger.from_json(json.dumps(content), "here.json")


def test_consumed_segments_leave_out_seen_replay(ledger: Ledger) -> None:
    found = ledger.consumed_segments()
    sources = {source.name: segments for source, segments in found.values()}
    assert sources.keys() == {"english", "python"}
    (english,) = sources["english"]
    (python,) = sources["python"]
    assert (english.start, english.count) == (0, 64)  # 8 steps of 8 samples
    assert (python.start, python.count) == (0, 24)  # 4 steps, three quarters of them
    assert ledger.stage.consumed == {"python": 24 * 16, "replay-english": 8 * 16}
    assert ledger.tokens == 12 * 128
