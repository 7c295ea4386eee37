"""Weights that were not made by training: a ledger of their own, a new optimizer, and a rate that warms up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megacpt.config import dump
from megacpt.continuation.boundary import RUN, annealed_config, create_run, first_ledger
from megacpt.continuation.ledger import LEDGER, Ledger
from megacpt.continuation.origin import converted_ledger
from megacpt.continuation.resume import check_resume
from megacpt.data.tokenizer import load_tokenizer
from megacpt.errors import ConfigError
from megacpt.optim.schedules import schedule_from_dict
from tests.continuation.conftest import stage
from tests.small import STEP, run_config

Streams = dict[str, str]
WARM = {"kind": "rewarmed_cosine", "warmup": "2 steps"}


def _write(folder: Path, ledger: Ledger, streams: Streams) -> Path:
    """Make a checkpoint (without tensors) of weights with this ledger."""
    config = run_config(folder, {"english": streams["english"]})
    checkpoint = folder / "checkpoints" / "step-00000000"
    checkpoint.mkdir(parents=True)
    (checkpoint / LEDGER).write_text(ledger.to_json())
    (checkpoint / RUN).write_text(dump(config))
    (checkpoint / "manifest.json").write_text('{"format": 1, "files": {}}')
    create_run(config, ledger)
    return checkpoint


@pytest.fixture
def converted(streams: Streams, tmp_path: Path) -> Path:
    """A checkpoint that was converted from another form."""
    model = run_config(tmp_path, {"english": streams["english"]}).model
    ledger = converted_ledger(model, load_tokenizer("bytes"), "from-hf", {"source": "someone/model", "sha256": "ab12"})
    return _write(tmp_path / "converted", ledger, streams)


@pytest.fixture
def averaged(english: Path, streams: Streams, tmp_path: Path) -> Path:
    """A checkpoint of averaged weights."""
    before = Ledger.read(english)
    ledger = replace(before, derived={"operation": "average", "of": [before.id], "weights": [1.0]})
    return _write(tmp_path / "averaged", ledger, streams)


def test_the_ledger_of_a_conversion(converted: Path) -> None:
    ledger = Ledger.read(converted)
    assert ledger.derived == {"operation": "from-hf", "source": "someone/model", "sha256": "ab12"}
    assert (ledger.tokens, ledger.stage.kind, ledger.stage.name) == (0, "converted", "from-hf")
    assert ledger.consumed_segments() == {}
    assert replace(ledger, derived={**ledger.derived, "sha256": "cd34"}).id != ledger.id


@pytest.mark.parametrize("parent", ["converted", "averaged"])
def test_a_stage_on_weights_alone_warms_up(
    parent: str, streams: Streams, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint: Path = request.getfixturevalue(parent)
    config = stage(tmp_path / "next", {"python": streams["python"]}, steps=8, schedule=WARM)
    start = first_ledger(config, checkpoint)
    assert start.derived is None
    assert start.parent == Ledger.read(checkpoint).id
    assert start.stage.entry_rate == 0.0
    schedule = schedule_from_dict(start.stage.schedule)
    assert [schedule.rate(n * STEP, 8 * STEP, 0.0) for n in (1, 2)] == [5e-3, 1e-2]
    assert start.stage.carry == {
        "optimizer": [None, "adamw"],
        "first_moment": {"factor": 0.0, "decay": [0.9, 0.9]},
        "second_moment": {"factor": 0.0, "decay": [0.95, 0.95]},
    }


def test_a_schedule_is_not_gone_on_with(averaged: Path, streams: Streams, tmp_path: Path) -> None:
    start = first_ledger(stage(tmp_path / "next", {"python": streams["python"]}), averaged)
    assert start.stage.schedule["offset"] == 0
    assert schedule_from_dict(start.stage.schedule).rate(STEP) == 5e-3


@pytest.mark.parametrize("parent", ["converted", "averaged"])
@pytest.mark.parametrize(
    "schedule",
    [
        {"kind": "constant", "warmup": 0},
        {"kind": "infinite", "warmup": "1 steps", "cooldown": "4 steps"},
        {"kind": "rewarmed_cosine", "warmup": 0},
    ],
)
def test_without_a_warmup_it_is_refused(
    parent: str, schedule: dict[str, Any], streams: Streams, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint: Path = request.getfixturevalue(parent)
    with pytest.raises(ConfigError, match=r"holds weights alone \((from-hf|average)\).*schedule\.warmup=1%"):
        first_ledger(stage(tmp_path / "next", {"python": streams["python"]}, schedule=schedule), checkpoint)


def test_weights_alone_are_not_annealed(averaged: Path, tmp_path: Path) -> None:
    config, parent = annealed_config(averaged, "50%", tmp_path / "release", [])
    with pytest.raises(ConfigError, match=r"holds weights alone \(average\).*begin a trunk stage with schedule\.kind"):
        first_ledger(config, parent)


def test_nor_gone_on_with(averaged: Path, streams: Streams) -> None:
    run = averaged.parent.parent
    with pytest.raises(ConfigError, match=r"no run to go on with; start a stage on them with `megacpt continue"):
        check_resume(run_config(run, {"english": streams["english"]}), Ledger.read(averaged), None)


def test_the_first_stage_that_is_trained_orders_the_data(converted: Path, streams: Streams, tmp_path: Path) -> None:
    start = first_ledger(stage(tmp_path / "next", {"python": streams["python"]}, schedule=WARM, seed=77), converted)
    (source,) = start.stage.plan.sources
    assert source.segments[0].key == 77


def test_its_peak_is_that_of_the_first_stage(converted: Path, streams: Streams, tmp_path: Path) -> None:
    config = stage(tmp_path / "next", {"python": streams["python"]}, schedule=WARM, optim={"peak_decay": 0.5})
    assert first_ledger(config, converted).stage.schedule["peak"] == 1e-2
