"""Subsets, epochs and orders of the new streams of a stage."""

from __future__ import annotations

from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config import RunConfig, StreamConfig
from megacpt.continuation.ledger import Ledger
from megacpt.continuation.planning.past import going_on, past_streams
from megacpt.continuation.planning.repeats import repetitions
from megacpt.data.plan import Curriculum, Segment, Subset
from megacpt.data.stage_data import StageData
from megacpt.data.stream import TokenStream
from megacpt.errors import ConfigError, DataError
from tests.continuation.conftest import Finish, stage
from tests.continuation.planned import by_name, offsets, plan_of, scored_stream, scores
from tests.small import run_config

Streams = dict[str, str]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a stream with scores, of 60 samples (less the last)."""
    return str(scored_stream(tmp_path_factory.mktemp("scored")))


def _windows(path: str, length: int = 16) -> int:
    return (TokenStream.open(path).tokens - 1) // length


def test_a_subset_is_a_part_of_the_stream(streams: Streams, tmp_path: Path) -> None:
    windows = _windows(streams["english"])
    for size, expected in {"25%": windows * 16 // 4 // 16, "320 tokens": 20, "327 tokens": 20}.items():
        plan = plan_of(run_config(tmp_path / "run", {"english": {"path": streams["english"], "subset": size}}))
        assert plan.sources[0].segments[0].subset == Subset(expected, "random")
        read = offsets(plan, 2 * expected, 0)
        assert len(set(read)) == expected  # twice each
        assert len(set(read[:expected])) == expected


def test_all_of_a_stream_is_no_subset(streams: Streams, tmp_path: Path) -> None:
    mixture = {"english": {"path": streams["english"], "subset": "100%"}}
    assert plan_of(run_config(tmp_path / "run", mixture)) == plan_of(
        run_config(tmp_path / "run", {"english": streams["english"]})
    )


def test_epochs_make_the_subset(streams: Streams, tmp_path: Path) -> None:
    mixture = {"english": {"path": streams["english"], "epochs": 4, "weight": 3}, "c": streams["c"]}
    config = run_config(tmp_path / "run", mixture, steps=8)
    plan = plan_of(config)
    taken = StageData(plan).counts(64)[0]
    assert taken == 48
    assert plan.sources[0].segments[0].subset == Subset(12)
    read = offsets(plan, 64, 0)
    assert {offset: read.count(offset) for offset in read} == dict.fromkeys(set(read), 4)


@given(epochs=st.floats(1, 8), weight=st.floats(0.05, 20), steps=st.integers(1, 12))
def test_no_sample_is_read_more_often_than_asked(
    streams: Streams, tmp_path_factory: pytest.TempPathFactory, epochs: float, weight: float, steps: int
) -> None:
    mixture = {"english": {"path": streams["english"], "epochs": epochs, "weight": weight}, "c": streams["c"]}
    plan = plan_of(run_config(tmp_path_factory.getbasetemp() / "run", mixture, steps=steps))
    read = offsets(plan, 8 * steps, 0)
    subset = plan.sources[0].segments[0].subset
    assert subset == (Subset(ceil(len(read) / epochs)) if read else None)
    assert max(map(read.count, read), default=0) <= ceil(epochs)


@pytest.mark.parametrize(("order", "parts"), [("ascending", 4), ("descending", 6), ("cyclical", 3)])
def test_an_order_by_score_spans_the_stage(scored: str, tmp_path: Path, order: str, parts: int) -> None:
    mixture = {"scored": {"path": scored, "order": order, "parts": parts}}
    plan = plan_of(run_config(tmp_path / "run", mixture, steps=6))
    assert plan.sources[0].segments[0].curriculum == Curriculum(order, parts)  # type: ignore[arg-type]
    assert plan.sources[0].segments[0].subset == Subset(48)
    read = scores(plan, 48)
    assert len(set(read)) == 48
    size = 48 // parts
    buckets = [read[at : at + size] for at in range(0, 48, size)]
    if order == "cyclical":
        assert all(bucket == sorted(bucket) for bucket in buckets)
    else:
        rising = buckets if order == "ascending" else buckets[::-1]
        assert all(max(low) < min(high) for low, high in pairwise(rising))


def test_the_best_and_the_worst(scored: str, tmp_path: Path) -> None:
    read = {}
    for select in ("best", "worst"):
        mixture = {"scored": {"path": scored, "epochs": 2, "select": select}}
        read[select] = scores(plan_of(run_config(tmp_path / "run", mixture, steps=4)), 32)
    assert len(set(read["best"])) == len(set(read["worst"])) == 16
    assert min(read["best"]) > 40
    assert max(read["worst"]) < 20


def test_a_longer_order_than_the_stream_begins_again(scored: str, tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", {"scored": {"path": scored, "order": "ascending"}}, steps=10)
    plan = plan_of(config)
    assert plan.sources[0].segments[0].subset is None
    assert len(set(scores(plan, 59))) == 59
    (warning,) = repetitions(config, {}, StageData(plan))
    assert warning == (
        "scored: it has 59 samples of 16 tokens; the stage takes 80: at its end each has been read 1.36 times"
    )


def test_scores_are_needed(streams: Streams, tmp_path: Path) -> None:
    plan = plan_of(run_config(tmp_path / "run", {"c": {"path": streams["c"], "subset": "50%", "select": "best"}}))
    with pytest.raises(DataError, match=r"has no scores .* --score FIELD"):
        StageData(plan)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"subset": "1M"}, r"stage\.mixture\.c\.subset: 1M would take 62,500 samples, but .* take less of it"),
        ({"subset": "15 tokens"}, r"stage\.mixture\.c\.subset: 15 tokens is less than one sample"),
        ({"epochs": 1}, r"stage\.mixture\.c\.epochs: 1\.0 would take 16,000 samples, .* read it more often"),
        ({"subset": "32 tokens", "order": "ascending"}, r"stage\.mixture\.c\.parts: 16 are more than the 2 samples"),
    ],
)
def test_what_does_not_fit_the_stream(streams: Streams, tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan_of(run_config(tmp_path / "run", {"c": {"path": streams["c"], **settings}}, steps=2000))


def test_one_stream_under_two_names(streams: Streams, tmp_path: Path) -> None:
    twice = {"english": streams["english"], "again": streams["english"]}
    with pytest.raises(ConfigError, match=r"stage\.mixture\.again is the same stream as english, read in the same way"):
        plan_of(run_config(tmp_path / "run", twice))
    parts = {"all": streams["english"], "some": {"path": streams["english"], "subset": "10%"}}
    assert len(plan_of(run_config(tmp_path / "run", parts)).sources) == 2


def test_another_order_begins_at_its_beginning(english: Path, streams: Streams, tmp_path: Path, finish: Finish) -> None:
    half = {"english": {"path": streams["english"], "subset": "50%"}}
    second = finish(stage(tmp_path / "second", half, steps=2), english)
    assert by_name(plan_of(stage(tmp_path / "third", half), second))["english"].segments[0].start == 16
    whole = by_name(plan_of(stage(tmp_path / "third", {"english": streams["english"]}), second))["english"]
    assert whole.segments[0].start == 64
    batch = {"sequences": 4, "seq_length": 32, "microbatch": 2}
    longer = by_name(plan_of(stage(tmp_path / "third", {"english": streams["english"]}, batch=batch), second))
    assert longer["english"].segments == (Segment(5, 32, 0, None),)


def test_going_on() -> None:
    whole, best = Segment(1, 8, 0, 10), Segment(1, 8, 3, 4, Subset(20, "best"))
    consumed = [whole, best, Segment(1, 8, 10, 5), Segment(1, 16, 0, 100), Segment(2, 8, 0, 100)]
    assert going_on(Segment(1, 8, 0, None), consumed) == Segment(1, 8, 15, None)
    assert going_on(best, consumed) == Segment(1, 8, 7, None, Subset(20, "best"))
    assert going_on(Segment(1, 8, 0, None, Subset(21, "best")), consumed).start == 0
    assert going_on(Segment(3, 8, 0, None), ()) == Segment(3, 8, 0, None)


def test_a_stream_that_is_read_again_is_told(english: Path, streams: Streams, tmp_path: Path) -> None:
    windows = _windows(streams["english"])
    steps = windows // 8
    config = stage(tmp_path / "again", {"english": streams["english"]}, steps=steps)
    assert Ledger.read(english).stage.consumed == {"english": 64 * 16}
    (warning,) = _warnings(config, english)
    times = (64 + 8 * steps) / windows
    assert warning == (
        f"english: it has {windows:,} samples of 16 tokens; 64 of them were read before, and the stage takes "
        f"{8 * steps:,}: at its end each has been read {times:.2f} times"
    )
    config = stage(tmp_path / "c", {"c": streams["c"]})
    assert not _warnings(config, english)
    asked = {"english": {"path": streams["english"], "epochs": 3}}
    assert _warnings(stage(tmp_path / "asked", asked), english) == [
        "english: 1,024 tokens of it were read before with another sequence length, subset or order; this order begins "
        "at its start, and meets some of them again"
    ]


def _warnings(config: RunConfig, parent: Path) -> list[str]:
    return list(repetitions(config, past_streams(Ledger.read(parent)), StageData(plan_of(config, parent))))


def test_defaults_mean_all_of_it() -> None:
    settings = StreamConfig.model_validate({"path": "x", "epochs": None, "subset": None})
    assert settings == StreamConfig.model_validate({"path": "x"})
