"""The metrics of a run: what a line says, what is forgotten after a crash, and what TensorBoard gets."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.train.callbacks import due
from megacpt.train.callbacks.metrics import forget_after
from tests.small import STEP, run_mapping
from tests.train.conftest import Session, metrics


@given(st.lists(st.tuples(st.integers(0, 9), st.text(max_size=5)), max_size=20), st.integers(-1, 9), st.data())
def test_later_lines_and_cut_off_ones_are_forgotten(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[int, str]], step: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    written = [json.dumps({"kind": "train", "step": number, "text": text}) for number, text in lines]
    cut = '{"kind": "train", "step": 0, "loss": 1'
    tail = cut[: data.draw(st.integers(0, len(cut)))]
    path.write_text("".join(f"{line}\n" for line in written) + tail)
    forget_after(path, step)
    kept = [line for line, (number, _) in zip(written, lines, strict=True) if number <= step]
    assert path.read_text() == "".join(f"{line}\n" for line in kept)
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_nothing_to_forget(tmp_path: Path) -> None:
    forget_after(tmp_path / "metrics.jsonl", 3)
    assert not (tmp_path / "metrics.jsonl").exists()


@given(st.integers(1, 100), st.integers(1, 20))
def test_due(step: int, every: int) -> None:
    assert due(step, every) == (step % every == 0)
    assert due(step, every, last=True)


def test_what_a_line_says(session: Session, streams: dict[str, str], tmp_path: Path) -> None:
    config = run_mapping(
        tmp_path / "run",
        {"english": streams["english"]},
        5,
        log={"every": "2 steps", "tensorboard": True},
        evaluate={"every": "100%", "streams": {"held-out": streams["english-valid"]}},
        optim={"peak_lr": 1e-2, "clip": 0.5},
    )
    session(config)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line in lines:
        assert line["tokens"] == line["lineage_tokens"] == line["step"] * STEP
        assert 3 < line["loss"] < math.log(320) + 0.1
        assert line["grad_norm"] > 0.5  # before clipping
        assert line["tokens_per_second"] > 0
        assert line["skipped"] is False
    assert sorted(line["seconds"] for line in lines) == [line["seconds"] for line in lines]
    evaluations = metrics(tmp_path / "run", "eval")
    assert [line["step"] for line in evaluations] == [0, 5]
    assert all(line["stream"] == "held-out" for line in evaluations)
    assert evaluations[1]["loss"] < evaluations[0]["loss"]

    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    losses = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert losses == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    bits = [(event.step, event.value) for event in board.Scalars("bits_per_byte/held-out")]
    assert bits == [(line["step"], pytest.approx(line["bits_per_byte"])) for line in evaluations]
    assert not [tag for tag in board.Tags()["scalars"] if tag.startswith("forgetting")]  # nothing is older


def test_tensorboard_shows_what_is_forgotten_live(session: Session, streams: dict[str, str], tmp_path: Path) -> None:
    """Forgetting counts from the start of the stage, also after a resume; the shares are those of the plan."""
    held_out = {name: streams[f"{name}-valid"] for name in ("english", "python")}
    first = run_mapping(tmp_path / "first", {"english": streams["english"]}, 3)
    parent = session(first)["checkpoint"]
    config = run_mapping(
        tmp_path / "second",
        {"python": streams["python"]},
        8,
        stage={"name": "second", "replay": {"share": "25%"}},
        log={"every": "2 steps", "tensorboard": True},
        evaluate={"every": "2 steps", "streams": held_out},
    )
    session(config, parent=parent, at=4, how="stop")
    session(config)
    lines = metrics(tmp_path / "second", "eval")
    english = {line["step"]: line["bits_per_byte"] for line in lines if line["stream"] == "english"}

    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(tmp_path / "second" / "tensorboard"))
    board.Reload()
    lost = {event.step: event.value for event in board.Scalars("forgetting/english")}
    assert lost == {step: pytest.approx(bits - english[0], abs=1e-6) for step, bits in english.items()}
    assert {0, 2, 4, 6, 8} <= lost.keys()
    of_all = {key: [event.value for event in board.Scalars(f"forgetting_of_all/{key}")] for key in ("mean", "max")}
    assert of_all["mean"] == of_all["max"] == list(lost.values())  # English is the only older stream
    assert "forgetting/python" not in board.Tags()["scalars"]
    shares = {
        name: [event.value for event in board.Scalars(f"mixture/{name}")] for name in ("python", "replay-english")
    }
    assert shares == {"python": [0.75] * 4, "replay-english": [0.25] * 4}


def test_speed_counts_the_steps_since_the_last_line(session: Session, streams: dict[str, str], tmp_path: Path) -> None:
    """After a resume too: not all tokens of the stage in the time of a few steps."""
    config = run_mapping(tmp_path / "run", {"english": streams["english"]}, 6, log={"every": "1 steps"})
    session(config, at=4, how="stop")
    session(config)
    for line in metrics(tmp_path / "run"):
        # A step takes a millisecond at the very least.
        assert line["tokens_per_second"] < STEP / 0.001
    seconds = [line["seconds"] for line in metrics(tmp_path / "run")]
    assert sorted(seconds) == seconds
