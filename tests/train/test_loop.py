"""The loop itself, with an engine that only listens: what it asks for, in which order, and how it ends."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megacpt.continuation.boundary import first_ledger
from megacpt.data.stage_data import StageData
from megacpt.engine.protocol import Batch, StepReport
from megacpt.evaluate.loss import StreamLoss
from megacpt.train.callbacks import Quiet
from megacpt.train.callbacks.progress import ProgressBar
from megacpt.train.loop import Run, train_loop
from tests.small import STEP, run_config


class Listener:
    """An engine without a model, one of two data-parallel ranks; it fails at the step `fail`."""

    data_rank, data_size, microbatch_multiple = 1, 2, 1

    def __init__(self, fail: int | None = None) -> None:
        self.fail = fail
        self.steps: list[tuple[Sequence[Batch], float, float]] = []

    def train_step(self, batches: Sequence[Batch], rate: float, weight_decay: float) -> StepReport:
        self.steps.append((batches, rate, weight_decay))
        if len(self.steps) == self.fail:
            raise RuntimeError("the engine failed")
        return StepReport(loss=2.5, tokens=STEP, grad_norm=1.0, skipped=False)


class Notes(Quiet):
    """A callback that notes what happens, and stops the run at a step."""

    def __init__(self, notes: list[str], name: str, stop: int | None = None) -> None:
        self.notes, self.name, self.stop = notes, name, stop

    def on_start(self, run: Run) -> None:
        self.notes.append(f"{self.name} starts")
        run.closing.callback(self.notes.append, f"{self.name} is closed")

    def on_step(self, run: Run, report: StepReport) -> None:
        assert report.loss == 2.5
        self.notes.append(f"{self.name} {run.step}")
        run.stopping = run.stopping or run.step == self.stop

    def on_end(self, run: Run) -> None:
        assert run.step
        self.notes.append(f"{self.name} ends")


def _run(streams: dict[str, str], folder: Path, engine: Any, steps: int = 3) -> Run:
    config = run_config(folder / "run", {"english": streams["english"]}, steps, optim={"weight_decay": 0.3})
    start = first_ledger(config, None)
    unused: Any = None
    return Run(config, engine, unused, StageData(start.stage.plan), start, unused, "tp1 pp1 cp1 dp2")


def test_every_step_gets_its_samples_its_rate_and_the_decay(streams: dict[str, str], tmp_path: Path) -> None:
    engine = Listener()
    run = _run(streams, tmp_path, engine)
    train_loop(run, [])
    assert (run.step, run.tokens, run.done) == (3, 3 * STEP, True)
    assert [(rate, decay) for _, rate, decay in engine.steps] == [(5e-3, 0.3), (1e-2, 0.3), (7.75e-3, 0.3)]
    for number, (batches, _, _) in enumerate(engine.steps):
        # Of 8 samples in microbatches of 2, this rank has the second and the fourth.
        samples = [number * 8 + k for k in (2, 3, 6, 7)]
        expected = np.stack([run.data.tokens(g) for g in samples]).reshape(2, 2, 17)
        assert np.array_equal(np.stack([batch.tokens for batch in batches]), expected)


def test_callbacks_act_in_their_order(streams: dict[str, str], tmp_path: Path) -> None:
    notes: list[str] = []
    train_loop(_run(streams, tmp_path, Listener(), steps=2), [Notes(notes, "a"), Notes(notes, "b")])
    steps = ["a 1", "b 1", "a 2", "b 2"]
    assert notes == ["a starts", "b starts", *steps, "a ends", "b ends", "b is closed", "a is closed"]


def test_a_stop_is_heard_by_all_and_ends_the_loop(streams: dict[str, str], tmp_path: Path) -> None:
    notes: list[str] = []
    run = _run(streams, tmp_path, Listener(), steps=5)
    train_loop(run, [Notes(notes, "a", stop=2), Notes(notes, "b")])
    assert notes[-5:] == ["b 2", "a ends", "b ends", "b is closed", "a is closed"]
    assert (run.step, run.done) == (2, False)


def test_after_a_failure_all_is_closed_and_nothing_else_happens(streams: dict[str, str], tmp_path: Path) -> None:
    notes: list[str] = []
    with pytest.raises(RuntimeError, match="the engine failed"):
        train_loop(_run(streams, tmp_path, Listener(fail=2)), [Notes(notes, "a"), Notes(notes, "b")])
    assert notes == ["a starts", "b starts", "a 1", "b 1", "b is closed", "a is closed"]


def test_the_ledger_of_a_moment(streams: dict[str, str], tmp_path: Path) -> None:
    run = _run(streams, tmp_path, Listener())
    before = run.ledger().stage
    assert (before.tokens, before.rate, before.phase) == (0, None, "warmup")
    train_loop(run, [])
    after = run.ledger().stage
    assert (after.steps, after.consumed, after.phase) == (3, {"english": 3 * STEP}, "cooldown")
    assert after.rate == 7.75e-3
    assert run.lineage_tokens == 3 * STEP


# What a person sees.


def _watch(
    streams: dict[str, str], folder: Path, terminal: bool, fail: int | None = None, steps: int = 3, resumed: int = 0
) -> str:
    shown = io.StringIO()
    metrics: Any = SimpleNamespace(latest={"tokens_per_second": 1234.5})
    evaluation: Any = SimpleNamespace(latest=[StreamLoss("english", 2.0, 1.875, 100)])
    console = Console(file=shown, force_terminal=terminal, width=150)
    bar = ProgressBar(metrics, evaluation, console)
    run = _run(streams, folder, Listener(fail), steps)
    run.step = resumed
    try:
        train_loop(run, [bar])
    except RuntimeError:
        assert fail is not None
    return shown.getvalue()


def test_where_there_is_no_terminal_a_line_now_and_then(streams: dict[str, str], tmp_path: Path) -> None:
    lines = _watch(streams, tmp_path, terminal=False).splitlines()
    assert lines[0] == f"first (trunk, 384 tokens, 3 steps, tp1 pp1 cp1 dp2) in {tmp_path / 'run'}"
    assert lines[1].startswith("step 0: ")
    assert lines[1].endswith("english 1.875")
    assert lines[-1] == "step 3/3  loss 2.500  rate 7.75e-03  1,234 tokens/s"
    assert len(_watch(streams, tmp_path, terminal=False, steps=1000).splitlines()) < 200


def test_what_an_earlier_session_measured_is_not_shown_as_new(streams: dict[str, str], tmp_path: Path) -> None:
    shown = _watch(streams, tmp_path, terminal=False, resumed=1)
    assert "resumed at step 1" in shown
    assert "english 1.875" not in shown


HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


@pytest.mark.parametrize("fail", [None, 2])
def test_the_bar_gives_the_cursor_back(streams: dict[str, str], tmp_path: Path, fail: int | None) -> None:
    shown = _watch(streams, tmp_path, terminal=True, fail=fail)
    assert HIDE in shown
    assert shown.rindex(SHOW) > shown.rindex(HIDE)
    assert ("3/3" in shown) == (fail is None)
