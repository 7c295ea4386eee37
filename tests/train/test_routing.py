"""Routing of held-out streams during training: what is written, what it is compared with, and no trace of it."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacpt.evaluate.choices import read_references
from tests.pool import Pools
from tests.small import MODEL, run_mapping
from tests.train.conftest import Session, metrics, weights

Streams = dict[str, str]
MOE = {**MODEL, "moe": {"experts": 4, "top_k": 2, "renormalise": True}}
MEASURED = {"max_load", "entropy", "dropped", "vocabulary", "co_activation"}


def _config(run: Path, streams: Streams, stream: str = "english", steps: int = 4, **changes: Any) -> dict[str, Any]:
    held_out = {name: streams[f"{name}-valid"] for name in ("english", "c")}
    evaluate = {"every": "2 steps", "dense": None, "tokens": 100, "streams": held_out, **changes.pop("evaluate", {})}
    sections = {"model": MOE, "stage": {"name": run.name}, **changes}
    return run_mapping(run, {stream: streams[stream]}, steps, evaluate=evaluate, **sections)


def _lines(run: Path, stream: str = "english") -> list[dict[str, Any]]:
    return [line for line in metrics(run, "routing") if line["stream"] == stream]


@pytest.fixture(scope="module")
def first(session: Session, streams: Streams, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A stage on English: its folder and its checkpoint."""
    run = tmp_path_factory.mktemp("runs") / "first"
    found = session(_config(run, streams, log={"every": "1 steps", "tensorboard": True}))
    assert found["error"] is None
    return run, found["checkpoint"]


def test_what_a_line_says(first: tuple[Path, str]) -> None:
    run, _ = first
    assert [line["step"] for line in _lines(run)] == [0, 2, 4]
    assert [line["step"] for line in _lines(run, "c")] == [0, 2, 4]
    for line in metrics(run, "routing"):
        assert line["layers"] == [1, 2]
        assert line.keys() >= MEASURED
        assert all(len(line[name]) == 2 for name in (*MEASURED, "saturation_start"))
        assert all(0.5 <= load <= 1 for load in line["max_load"])
        assert line["dropped"] == [0, 0]
        assert "saturation_home" not in line  # nothing was trained on before
        assert ("expert_load" in line) == (line["step"] in (0, 4))
    start, later, end = _lines(run)
    assert start["saturation_start"] == [1, 1]
    assert max(later["saturation_start"]) < 1
    for load, most, entropy in zip(end["expert_load"], end["max_load"], end["entropy"], strict=True):
        assert sum(load) == pytest.approx(1, abs=1e-5)
        assert max(load) * 2 == pytest.approx(most, abs=1e-5)  # 2 choices a token, and all tokens are one batch
        assert -sum(p * math.log(p, 4) for p in load if p) == pytest.approx(entropy, abs=1e-4)
    shared = metrics(run, "information")
    assert [line["step"] for line in shared] == [0, 2, 4]
    assert shared[0]["streams"] == ["english", "c"]
    assert all(0 <= share <= 1 for line in shared for share in line["information_share"])


def test_tensorboard_has_it_too(first: tuple[Path, str]) -> None:
    run, _ = first
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    found = [(event.step, event.value) for event in board.Scalars("routing/max_load/english")]
    assert found == [(line["step"], pytest.approx(np.mean(line["max_load"]), abs=1e-5)) for line in _lines(run)]
    second = [event.value for event in board.Scalars("routing_layers/saturation_start/c/layer-2")]
    assert second == [pytest.approx(line["saturation_start"][1], abs=1e-5) for line in _lines(run, "c")]
    assert len(board.Scalars("routing/information/streams")) == 3


def test_a_later_stage_compares_with_the_boundary_and_with_the_end_of_a_streams_own_stage(
    session: Session, streams: Streams, tmp_path: Path
) -> None:
    parent, ends = None, []
    for name, stream in (("one", "english"), ("two", "c"), ("three", "python")):
        found = session(_config(tmp_path / name, streams, stream), parent=parent)
        assert found["error"] is None
        parent = found["checkpoint"]
        ends.append(read_references(tmp_path / name / "routing.npz"))
    assert [sorted(kept.get("home", {})) for kept in ends] == [[], ["english"], ["c", "english"]]
    # In the second stage both comparisons of English are with the end of the first; in the third they are not.
    for line in _lines(tmp_path / "two"):
        assert line["saturation_home"] == line["saturation_start"]
    assert all("saturation_home" not in line for line in _lines(tmp_path / "two", "c"))
    third = _lines(tmp_path / "three")
    assert third[0]["saturation_start"] == [1, 1]
    # The start of the third stage is the end of the second, also for English since its own stage.
    assert third[0]["saturation_home"] == _lines(tmp_path / "two")[-1]["saturation_home"]
    assert third[-1]["saturation_home"] != third[-1]["saturation_start"]
    assert _lines(tmp_path / "three", "c")[-1]["saturation_home"]
    own, later = ends[1]["home"]["english"], ends[2]["home"]["english"]
    assert own.sample == later.sample
    assert np.array_equal(own.experts, later.experts)


def test_a_resume_compares_with_the_same_choices(session: Session, streams: Streams, tmp_path: Path) -> None:
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    session(_config(whole, streams, steps=6))
    session(_config(cut, streams, steps=6), at=4, how="crash")
    kept = (cut / "routing.npz").read_bytes()
    found = session(_config(cut, streams, steps=6))
    assert found["complete"]
    assert (cut / "routing.npz").read_bytes() == kept
    for kind in ("routing", "information"):
        assert metrics(cut, kind) == metrics(whole, kind)
    assert not list(cut.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_without_its_file_a_resume_goes_on_without_the_comparison(
    damage: str, session: Session, streams: Streams, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    session(_config(run, streams), at=3, how="stop")
    path = run / "routing.npz"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    assert session(_config(run, streams))["complete"]
    last = _lines(run)[-1]
    assert last["step"] == 4
    assert last.keys() >= MEASURED
    assert "saturation_start" not in last


def test_other_tokens_are_not_compared(session: Session, streams: Streams, tmp_path: Path) -> None:
    run = tmp_path / "run"
    session(_config(run, streams), at=3, how="stop")
    assert session(_config(run, streams, evaluate={"routing": 50}))["complete"]
    assert ["saturation_start" in line for line in _lines(run)] == [True, True, False]


def test_it_leaves_no_trace_in_the_weights(pools: Pools, session: Session, streams: Streams, tmp_path: Path) -> None:
    found = {}
    for name, tokens in (("watched", "1k"), ("plain", None)):
        config = _config(tmp_path / name / "run", streams, evaluate={"every": "1 steps", "routing": tokens})
        result = session(config)
        assert result["complete"]
        found[name] = weights(pools, result["checkpoint"], model=MOE), metrics(tmp_path / name / "run", "train")
    (one, steps), (other, others) = found["watched"], found["plain"]
    assert one == other
    assert [line["loss"] for line in steps] == [line["loss"] for line in others]
    assert _lines(tmp_path / "watched" / "run")
    assert not _lines(tmp_path / "plain" / "run")
    assert not (tmp_path / "plain" / "run" / "routing.npz").exists()


def test_dense_models_pay_nothing(session: Session, streams: Streams, tmp_path: Path) -> None:
    run = tmp_path / "run"
    session(_config(run, streams, model=MODEL))
    assert not metrics(run, "routing")
    assert not metrics(run, "information")
    assert not (run / "routing.npz").exists()


def test_only_layers_with_experts_count(session: Session, streams: Streams, tmp_path: Path) -> None:
    run = tmp_path / "run"
    moe = {"experts": 5, "top_k": 1, "first_dense": 1}
    session(_config(run, streams, model={**MODEL, "layers": 3, "moe": moe}))
    line = _lines(run)[-1]
    assert line["layers"] == [2, 3]
    assert [len(load) for load in line["expert_load"]] == [5, 5]
    assert "co_activation" not in line


def test_data_parallel_ranks_see_the_same(session: Session, streams: Streams, tmp_path: Path) -> None:
    """Float32 sums differ in the last bits between layouts, so that after the start a choice may differ."""
    session(_config(tmp_path / "1" / "run", streams))
    session(_config(tmp_path / "2" / "run", streams), ranks=2)
    one, two = _lines(tmp_path / "1" / "run"), _lines(tmp_path / "2" / "run")
    assert one[0] == two[0]
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a["max_load"] == pytest.approx(b["max_load"], abs=0.02)
        assert a["saturation_start"] == pytest.approx(b["saturation_start"], abs=0.02)
