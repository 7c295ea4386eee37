"""Which stretches of which streams a stage reads, and in which shares."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from megacpt.config import RunConfig
from megacpt.continuation.ledger import Ledger
from megacpt.continuation.planning import plan_stage
from megacpt.data.order import derive_key
from megacpt.data.plan import StagePlan
from megacpt.data.stage_data import StageData
from megacpt.data.tokenizer import load_tokenizer
from megacpt.errors import ConfigError
from tests.continuation.conftest import Finish, stage
from tests.small import run_config

Streams = dict[str, str]


def _plan(config: RunConfig, parent: Path | None = None) -> StagePlan:
    return plan_stage(config, None if parent is None else Ledger.read(parent), load_tokenizer("bytes"))


def _windows(plan: StagePlan, samples: int, source: int) -> list[int]:
    """The offsets of the samples of one source among the first samples of a stage."""
    data = StageData(plan)
    located = [data.locate(g) for g in range(samples)]
    return [location.offset for location in located if location.source == source]


def test_a_first_stage_reads_its_mixture_from_the_start(streams: Streams, tmp_path: Path) -> None:
    mixture = {
        "english": {"path": streams["english"], "weight": 3},
        "c": {"path": streams["c"], "weight": 1},
        "python": {"path": streams["python"], "weight": 0},
    }
    plan = _plan(run_config(tmp_path / "run", mixture))
    assert [(s.name, s.weight, s.role, s.policy) for s in plan.sources] == [
        ("english", 0.75, "new", None),
        ("c", 0.25, "new", None),
    ]
    assert all(s.segments[0].start == 0 and s.segments[0].count is None for s in plan.sources)
    assert {s.segments[0].key for s in plan.sources} == {5}
    assert StageData(plan).counts(400) == (300, 100)


def test_a_stream_goes_on_where_it_stopped(english: Path, streams: Streams, tmp_path: Path, finish: Finish) -> None:
    mixture = {"again": streams["english"], "python": streams["python"]}
    second = finish(stage(tmp_path / "second", mixture, steps=2), english)
    plan = Ledger.read(second).stage.plan
    assert plan.sources[0].segments[0].start == 64
    third = _plan(stage(tmp_path / "third", {"english": streams["english"]}), second)
    assert third.sources[0].segments[0].start == 64 + 8
    whole = _plan(run_config(tmp_path / "whole", {"english": streams["english"]}))
    order = _windows(whole, 80, 0)
    assert _windows(plan, 16, 0) == order[64:72]
    assert _windows(third, 8, 0) == order[72:]


def test_the_seed_of_the_first_stage_orders_all(english: Path, streams: Streams, tmp_path: Path) -> None:
    plan = _plan(stage(tmp_path / "next", {"english": streams["english"]}, seed=99), english)
    assert plan.key == plan.sources[0].segments[0].key == 5


def test_a_new_stream_beside_seen_replay(english: Path, streams: Streams, tmp_path: Path) -> None:
    config = stage(tmp_path / "python", {"python": streams["python"]}, replay={"share": "25%", "policy": "seen"})
    plan = _plan(config, english)
    new, old = plan.sources
    assert (new.name, new.weight) == ("python", 0.75)
    assert (old.name, old.role, old.policy, old.weight) == ("replay-english", "replay", "seen", 0.25)
    assert [(s.start, s.count) for s in old.segments] == [(0, 64)]
    assert plan.key == derive_key(5, "replay", 1)
    assert StageData(plan).counts(400) == (300, 100)
    consumed = set(_windows(Ledger.read(english).stage.plan, 64, 0))
    drawn = _windows(plan, 256, 1)
    assert set(drawn) == consumed  # 64 draws of 64 consumed samples: each of them once
    assert len(drawn) == 64


def test_a_new_stream_beside_fresh_replay(english: Path, streams: Streams, tmp_path: Path) -> None:
    config = stage(tmp_path / "python", {"python": streams["python"]}, replay={"share": "50%", "policy": "fresh"})
    plan = _plan(config, english)
    assert (plan.sources[1].policy, plan.sources[1].segments[0].start) == ("fresh", 64)
    whole = _plan(run_config(tmp_path / "whole", {"english": streams["english"]}))
    assert _windows(plan, 64, 1) == _windows(whole, 96, 0)[64:]


def test_fresh_replay_of_fresh_replay_goes_on(english: Path, streams: Streams, tmp_path: Path, finish: Finish) -> None:
    replay = {"share": "50%", "policy": "fresh"}
    python = finish(stage(tmp_path / "python", {"python": streams["python"]}, replay=replay), english)
    plan = _plan(stage(tmp_path / "c", {"c": streams["c"]}, replay=replay), python)
    starts = {source.name: source.segments[0].start for source in plan.sources}
    assert starts == {"c": 0, "replay-english": 64 + 16, "replay-python": 16}


def test_shares_of_several_earlier_streams_follow_what_was_consumed(
    english: Path, streams: Streams, tmp_path: Path, finish: Finish
) -> None:
    python = finish(stage(tmp_path / "python", {"python": streams["python"]}, steps=2), english)
    plan = _plan(stage(tmp_path / "c", {"c": streams["c"]}, replay={"share": "40%", "policy": "seen"}), python)
    weights = {source.name: source.weight for source in plan.sources}
    assert weights == pytest.approx({"c": 0.6, "replay-english": 0.4 * 0.8, "replay-python": 0.4 * 0.2}, abs=1e-15)
    counts = StageData(plan).counts(10_000)
    assert [Fraction(n, 10_000) for n in counts] == [Fraction(60, 100), Fraction(32, 100), Fraction(8, 100)]


def test_an_unfinished_stage_replays_what_it_came_to(streams: Streams, tmp_path: Path, finish: Finish) -> None:
    half = finish(run_config(tmp_path / "half", {"english": streams["english"]}, steps=8), steps=3)
    plan = _plan(stage(tmp_path / "python", {"python": streams["python"]}, replay={"share": "25%"}), half)
    assert [(s.start, s.count) for s in plan.sources[1].segments] == [(0, 24)]


def test_streams_of_the_stage_itself_are_not_replayed(
    english: Path, streams: Streams, tmp_path: Path, finish: Finish
) -> None:
    python = finish(stage(tmp_path / "python", {"python": streams["python"]}), english)
    config = stage(tmp_path / "again", {"renamed": streams["english"]}, replay={"share": "25%"})
    assert [source.name for source in _plan(config, python).sources] == ["renamed", "replay-python"]


def test_names_do_not_collide(english: Path, streams: Streams, tmp_path: Path, finish: Finish) -> None:
    mixture = {"english": streams["c"], "replay-english": streams["python"]}
    second = finish(stage(tmp_path / "second", mixture), english)
    config = stage(tmp_path / "third", {"replay-english": streams["c-valid"]}, replay={"share": "50%"})
    names = [source.name for source in _plan(config, second).sources]
    assert names == ["replay-english", "replay-english-2", "replay-english-3", "replay-english-4"]


def test_replay_of_nothing_is_refused(english: Path, streams: Streams, tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", {"english": streams["english"]})
    replaying = config.stage.model_copy(
        update={"replay": stage(tmp_path, {"x": "x"}, replay={"share": "5%"}).stage.replay}
    )
    config = config.model_copy(update={"stage": replaying})
    with pytest.raises(ConfigError, match=r"stage\.replay\.share is 5%, .*this is the first stage; set stage"):
        _plan(config)
    with pytest.raises(ConfigError, match=r"the mixture holds every earlier stream already"):
        _plan(config, english)


def test_seen_samples_shorter_than_the_stage_are_refused(english: Path, streams: Streams, tmp_path: Path) -> None:
    batch = {"sequences": 4, "seq_length": 32, "microbatch": 2}
    config = stage(tmp_path / "long", {"python": streams["python"]}, replay={"share": "25%"}, batch=batch)
    with pytest.raises(ConfigError, match=r"all that was seen was read in samples shorter .* 32: take policy fresh"):
        _plan(config, english)


def test_shorter_samples_are_left_out_where_there_are_longer_ones(
    english: Path, streams: Streams, finish: Finish, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batch = {"sequences": 4, "seq_length": 32, "microbatch": 2}
    longer = finish(stage(tmp_path / "c", {"c": streams["c"]}, batch=batch), english)
    config = stage(tmp_path / "long", {"python": streams["python"]}, replay={"share": "25%"}, batch=batch)
    plan = _plan(config, longer)
    assert [source.name for source in plan.sources] == ["python", "replay-c"]
    assert "english was read in samples of 16 tokens, and the stage needs 32: nothing of it is replayed" in caplog.text
    StageData(plan)
