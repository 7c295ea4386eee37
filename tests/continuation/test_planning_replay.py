"""The policies of replay: what each draws from, and in which shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpt.config import ReplayConfig, RunConfig
from megacpt.continuation.boundary import create_run, first_ledger
from megacpt.continuation.ledger import Ledger
from megacpt.continuation.planning.past import PastStream, past_streams
from megacpt.continuation.planning.repeats import repetitions
from megacpt.continuation.planning.replay import _proportions
from megacpt.continuation.resume import find_data
from megacpt.data.plan import Segment, StagePlan, Subset
from megacpt.data.reservoir import reservoir_ordinals
from megacpt.data.stage_data import StageData
from megacpt.errors import ConfigError
from tests.continuation.conftest import Finish, stage
from tests.continuation.planned import by_name, offsets, plan_of, shares
from tests.small import make_stream, run_config

Streams = dict[str, str]


def _shares_of(tokens: Mapping[str, tuple[int, ...]], **settings: Any) -> dict[str, float]:
    """How replay is shared among streams of which so many tokens were read in each stage, in parts of all of it."""
    past = {name: PastStream(name, name, (), read) for name, read in tokens.items()}
    found = _proportions(ReplayConfig.model_validate(settings), past, None)
    return {name: weight / sum(found.values()) for name, weight in found.items()}


def test_three_data_sets_of_ibrahim_2024(streams: Streams, tmp_path: Path, finish: Finish) -> None:
    """The weights of arXiv 2403.08763: 300B tokens of the Pile, then 100B of each of three shards, with 5% replay.

    Here with a token for a million, and streams of another content.
    """

    def planned(name: str, stream: str, tokens: int) -> RunConfig:
        more: dict[str, Any] = {} if name == "pile" else {"replay": {"share": "5%"}}
        return run_config(
            tmp_path / name, {}, stage={"name": name, "tokens": tokens, "mixture": {name: stream}, **more}
        )

    pile = finish(planned("pile", streams["english"], 300_000))
    one = finish(planned("one", streams["python"], 100_000), pile)
    two = planned("two", streams["c"], 100_000)
    assert _percent(plan_of(two, one)) == pytest.approx([95, 3.8125, 1.1875], abs=1e-3)
    three = planned("three", streams["c-valid"], 100_000)
    assert _percent(plan_of(three, finish(two, one))) == pytest.approx([95, 3.088125, 0.961875, 0.95], abs=1e-3)


def _percent(plan: StagePlan) -> list[float]:
    return [100 * source.weight for source in plan.sources]


def test_shares_follow_all_past_tokens() -> None:
    """Counts as published: replayed tokens are tokens of their stream."""
    one = _shares_of({"pile": (300, 5), "sp1": (0, 95)})
    assert [5 * one[name] for name in one] == pytest.approx([3.8125, 1.1875], abs=1e-12)
    two = _shares_of({"pile": (300, 5, 3.8125), "sp1": (0, 95, 1.1875), "sp2": (0, 0, 95)})  # type: ignore[dict-item]
    assert [5 * two[name] for name in two] == pytest.approx([3.088125, 0.961875, 0.95], abs=1e-12)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 10**12), min_size=3, max_size=3), min_size=1, max_size=6),
    st.floats(0, 4),
)
def test_power_law(tokens: list[list[int]], exponent: float) -> None:
    named = {str(i): (*row, 1) for i, row in enumerate(tokens)}
    found = _shares_of(named, policy="power_law", exponent=exponent)
    weight = {name: sum(n / (len(row) - at) ** exponent for at, n in enumerate(row)) for name, row in named.items()}
    assert found == pytest.approx({name: w / sum(weight.values()) for name, w in weight.items()}, rel=1e-9)
    assert _shares_of(named, policy="power_law", exponent=0) == _shares_of(named)


def test_older_stages_come_less_often(english: Path, streams: Streams, tmp_path: Path, finish: Finish) -> None:
    python = finish(stage(tmp_path / "python", {"python": streams["python"]}, steps=8), english)
    replay = {"share": "48%", "policy": "power_law", "exponent": 1}
    plan = plan_of(stage(tmp_path / "c", {"c": streams["c"]}, replay=replay), python)
    assert shares(plan, 10_000) == {"c": 0.52, "replay-english": 0.16, "replay-python": 0.32}
    assert {s.policy for s in plan.sources} == {None, "power_law"}


def test_a_reservoir(english: Path, streams: Streams, tmp_path: Path, finish: Finish) -> None:
    python = finish(stage(tmp_path / "python", {"python": streams["python"]}, steps=8), english)
    replay = {"share": "25%", "policy": "reservoir", "size": "512"}
    plan = plan_of(stage(tmp_path / "c", {"c": streams["c"]}, replay=replay), python)
    old = [source for source in plan.sources if source.role == "replay"]
    inside = [
        sum(len(reservoir_ordinals(s.content_hash, segment, s.threshold or 0)) for segment in s.segments) for s in old
    ]
    assert sum(inside) == 32  # 512 tokens
    assert [s.weight for s in old] == [0.25 * n / 32 for n in inside]
    data = StageData(plan)
    assert [data.distinct(i) for i in (1, 2)] == inside
    # The same reservoir where one of its streams is in the mixture: what is left of it is replayed.
    beside = {"c": streams["c"], "python": streams["python"]}
    (english_only,) = [
        s for s in plan_of(stage(tmp_path / "x", beside, replay=replay), python).sources if s.role == "replay"
    ]
    assert replace(english_only, weight=old[0].weight) == old[0]
    assert english_only.weight == 0.25


def test_a_reservoir_with_nothing_to_replay(english: Path, streams: Streams, tmp_path: Path, finish: Finish) -> None:
    python = finish(stage(tmp_path / "python", {"python": streams["python"]}, steps=8), english)
    replay = {"share": "25%", "policy": "reservoir", "size": "16"}
    (_, only) = plan_of(stage(tmp_path / "c", {"c": streams["c"]}, replay=replay), python).sources
    itself = stage(tmp_path / "again", {"again": only.path}, replay=replay)
    with pytest.raises(ConfigError, match=r"stage\.replay\.size: the reservoir of 16 tokens holds nothing of the str"):
        plan_of(itself, python)


def test_replay_from_outside(streams: Streams, tmp_path: Path, finish: Finish) -> None:
    """A first stage may replay, too; a later one goes on in the same streams, or replays what was seen of them."""
    outside = {
        "web": {"path": streams["english"], "weight": 3},
        "code": streams["python"],
        "no": {"path": "x", "weight": 0},
    }
    replay = {"share": "40%", "policy": "external", "streams": outside}
    first = stage(tmp_path / "first", {"c": streams["c"]}, steps=10, replay=replay)
    plan = plan_of(first)
    assert {s.name: (s.policy, s.weight) for s in plan.sources} == {
        "c": (None, 0.6),
        "replay-web": ("external", pytest.approx(0.3)),
        "replay-code": ("external", pytest.approx(0.1)),
    }
    assert StageData(plan).counts(80) == (48, 24, 8)
    checkpoint = finish(first)
    again = by_name(plan_of(stage(tmp_path / "again", {"c-valid": streams["c-valid"]}, replay=replay), checkpoint))
    assert {name: source.segments[0].start for name, source in again.items()} == {
        "c-valid": 0,
        "replay-web": 24,
        "replay-code": 8,
    }
    seen = plan_of(stage(tmp_path / "seen", {"c-valid": streams["c-valid"]}, replay={"share": "25%"}), checkpoint)
    assert {s.name: s.weight for s in seen.sources} == pytest.approx(
        {"c-valid": 0.75, "replay-c": 0.25 * 0.6, "replay-web": 0.25 * 0.3, "replay-code": 0.25 * 0.1}
    )


def test_a_stream_from_outside_that_is_there_already(streams: Streams, tmp_path: Path) -> None:
    replay = {"share": "40%", "policy": "external", "streams": {"web": streams["c"]}}
    with pytest.raises(ConfigError, match=r"stage\.replay\.streams\.web is the same stream as stage\.mixture\.c"):
        plan_of(stage(tmp_path / "run", {"c": streams["c"]}, replay=replay))
    twice = {**replay, "streams": {"a": streams["english"], "b": streams["english"]}}
    with pytest.raises(ConfigError, match=r"streams\.b is the same stream as stage\.replay\.streams\.a"):
        plan_of(stage(tmp_path / "run", {"c": streams["c"]}, replay=twice))


def test_streams_from_outside_may_move(streams: Streams, tmp_path: Path) -> None:
    web = make_stream(tmp_path / "old", "english", seed=7)
    replay: dict[str, Any] = {"share": "40%", "policy": "external", "streams": {"web": str(web)}}
    config = stage(tmp_path / "run", {"c": streams["c"]}, replay=replay)
    start = first_ledger(config, None)
    create_run(config, start)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = tmp_path / "new" / "english"
    replay["streams"] = {"web": str(moved)}
    found = find_data(start, stage(tmp_path / "run", {"c": streams["c"]}, replay=replay))
    assert [source.path for source in found.stage.plan.sources] == [streams["c"], str(moved)]
    assert found.id == start.id


def test_fresh_replay_goes_on_as_the_stream_was_read(streams: Streams, tmp_path: Path, finish: Finish) -> None:
    half = {"english": {"path": streams["english"], "subset": "640 tokens"}}
    first = finish(run_config(tmp_path / "first", half, steps=3))
    replay = {"share": "50%", "policy": "fresh"}
    plan = plan_of(stage(tmp_path / "second", {"c": streams["c"]}, replay=replay), first)
    assert plan.sources[1].segments == (Segment(5, 16, 24, None, Subset(40)),)
    batch = {"sequences": 4, "seq_length": 32, "microbatch": 2}
    plan = plan_of(stage(tmp_path / "second", {"c": streams["c"]}, replay=replay, batch=batch), first)
    assert plan.sources[1].segments == (Segment(5, 32, 0, None, Subset(20)),)
    assert len(set(offsets(plan, 40, 1))) == 20


def test_replay_of_few_samples_is_told(english: Path, streams: Streams, tmp_path: Path) -> None:
    config = stage(tmp_path / "c", {"c": streams["c"]}, steps=20, replay={"share": "50%"})
    (warning,) = repetitions(config, past_streams(Ledger.read(english)), StageData(plan_of(config, english)))
    assert warning == ("replay-english: the stage replays 80 samples of the 64 that were seen: each comes 1.25 times")


def test_a_converted_model_has_nothing_of_its_own(english: Path, streams: Streams, tmp_path: Path) -> None:
    """Its ledger holds a stage of no tokens."""
    ledger = Ledger.read(english).with_stage(tokens=0, steps=0, consumed={})
    (english / "ledger.json").write_text(ledger.to_json())
    config = stage(tmp_path / "c", {"c": streams["c"]}, replay={"share": "25%"})
    with pytest.raises(ConfigError, match=r"it is not known what the checkpoint was trained on; .*policy=external"):
        plan_of(config, english)
