"""Schedules by name: the published values, what goes before them, and names that are nearly right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megacpt.config import RunConfig, load_run, overlay, run_from_mapping
from megacpt.config.explain import explain
from megacpt.config.library import names
from megacpt.errors import ConfigError
from tests.config.helpers import make_run, plain_run


def named(schedule: str, *overrides: str, **optim: Any) -> RunConfig:
    """The shortest run with a schedule by name, and without a peak rate of its own."""
    return run_from_mapping({**plain_run(), "schedule": schedule, "optim": optim}, overrides)


@pytest.mark.parametrize("name", names("schedules"))
def test_every_preset_makes_a_run(name: str) -> None:
    run = named(name, "stage.tokens=300B", "batch={sequences: 1024, seq_length: 2048}")
    assert 1e-4 < run.optim.peak_lr < 3e-3


@pytest.mark.parametrize(
    ("name", "peak", "low", "more"),
    [
        ("ibrahim2024-405m", 3e-4, 3e-5, {"kind": "cosine"}),
        ("ibrahim2024-10b-rewarm", 1.2e-4, 1.2e-5, {"kind": "rewarmed_cosine"}),
        ("ibrahim2024-405m-infinite-inverse-sqrt", 3e-4, 3e-5, {"cooldown_shape": "inverse_sqrt", "timescale": 10}),
        ("therien2025-moe", 3e-4, 3e-5, {"kind": "infinite", "cooldown_shape": "cosine"}),
        ("spectra-1.1b", 1.3e-3, 0, {"kind": "trilm"}),
        ("spectra-floatlm-1.1b", 2.2e-4, 2.2e-5, {"kind": "cosine"}),
    ],
)
def test_published_values(name: str, peak: float, low: float, more: dict[str, Any]) -> None:
    run = named(name)
    schedule = run.schedule.model_dump()
    assert run.optim.peak_lr == peak
    assert getattr(run.schedule, "min_lr").value(peak) == pytest.approx(low)  # noqa: B009
    assert {key: schedule[key] for key in more} == more


def test_what_the_run_gives_goes_first() -> None:
    assert named("spectra-1.1b", peak_lr=2e-3).optim.peak_lr == 2e-3
    assert named("spectra-1.1b", "optim.peak_lr=2e-3").optim.peak_lr == 2e-3
    assert make_run("schedule=ibrahim2024-10b").optim.peak_lr == 3e-4


def test_on_the_command_line() -> None:
    data = {**plain_run(), "optim": {}}
    run = run_from_mapping(data, ["schedule=ibrahim2024-405m", "schedule.min_lr=5%"])
    assert (run.optim.peak_lr, run.schedule.kind) == (3e-4, "cosine")
    assert run.schedule == run_from_mapping(plain_run(), ["schedule={kind: cosine, min_lr: 5%}"]).schedule
    assert named("ibrahim2024-405m", "schedule.min_lr=5%").schedule == run.schedule


def test_a_stage_takes_the_whole_preset_with_its_peak() -> None:
    parent = make_run("schedule.sampling=7 steps", "optim.peak_lr=2e-4", "schedule.min_lr=1e-5", "optim.beta2=0.9")
    stage = {"stage": {"name": "next", "tokens": "20M", "mixture": {"x": "x"}}, "schedule": "ibrahim2024-405m-infinite"}
    made = overlay(parent, stage, run="runs/next")
    assert made.schedule == named("ibrahim2024-405m-infinite").schedule
    assert (made.optim.peak_lr, made.optim.beta2) == (3e-4, 0.9)
    assert overlay(parent, {**stage, "optim": {"peak_lr": 4e-4}}, run="runs/next").optim.peak_lr == 4e-4


def test_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("peak_lr: 5e-4\nkind: constant\n")
    run = named(str(path))
    assert (run.optim.peak_lr, run.schedule.kind) == (5e-4, "constant")


def test_mistakes_point_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("peak_lr: -1\nkind: constant\nwarmpu: 1%\n")
    with pytest.raises(ConfigError) as caught:
        named(str(path))
    assert f"{path}:1: optim.peak_lr: " in str(caught.value)
    assert f"{path}:3: schedule.warmpu: unknown key; did you mean 'schedule.warmup'" in str(caught.value)


@pytest.mark.parametrize("overrides", [["schedule=ibrahim2024-405"], []])
def test_unknown_names(overrides: list[str]) -> None:
    data = plain_run() if overrides else {**plain_run(), "schedule": "ibrahim2024-405"}
    with pytest.raises(ConfigError, match=r"schedule: there is no schedule .*; did you mean 'ibrahim2024-405m'"):
        run_from_mapping(data, overrides)


def test_explained() -> None:
    assert "therien2025-moe" in explain("schedule")


def test_a_run_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: r\nmodel: tiny\ntokenizer: bytes\nschedule: therien2025-moe\noptim: {}\n"
        "stage: {name: a, tokens: 20M, mixture: {a: a}}\nbatch: {sequences: 8, seq_length: 64}\n"
    )
    assert load_run(path).optim.peak_lr == 3e-4
