from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megacpt.config import ConstantSchedule, InfiniteSchedule, RunConfig, dump, run_from_mapping
from megacpt.errors import ConfigError
from tests.config.helpers import make_run, plain_run


def test_defaults() -> None:
    run = make_run()
    assert run.schedule == InfiniteSchedule()
    assert run.stage.mixture["english"].path == Path("data/english")
    assert run.stage.mixture["english"].weight == 1
    assert run.stage.replay.share == 0.0
    assert run.parallel.tensor == 1
    assert run.precision == "float32"


def test_step_counts() -> None:
    run = make_run("stage.tokens=20M")
    assert run.tokens_per_step == 8192
    assert run.stage_steps == 2442
    assert (run.stage_steps - 1) * 8192 < 20_000_000 <= run.stage_steps * 8192
    assert make_run("stage.tokens=8192").stage_steps == 1
    assert make_run("stage.tokens=8193").stage_steps == 2
    assert make_run("stage.tokens=1").stage_steps == 1


def test_the_kind_of_schedule_has_a_default() -> None:
    run = run_from_mapping({**plain_run(), "schedule": {"warmup": "2%"}})
    assert run.schedule == InfiniteSchedule.model_validate({"kind": "infinite", "warmup": "2%"})


def test_sections_whose_keys_are_commented_out() -> None:
    empty = {"parallel": None, "checkpoint": None, "evaluate": {"streams": None}, "schedule": None}
    assert run_from_mapping({**plain_run(), **empty}) == make_run()


def test_home_folders() -> None:
    assert make_run("run=~/runs/x").run == Path.home() / "runs/x"


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (
            ["schedule.min_lr=4e-4"],
            "schedule.min_lr",
            "4e-4 is above optim.peak_lr, 3e-4: take less, or a percentage of the peak",
        ),
        (["schedule.constant_lr=4e-4"], "schedule.constant_lr", "4e-4 is above optim.peak_lr"),
        (["schedule.constant_lr=5%"], "schedule.constant_lr", "5% (1.5e-5) is below schedule.min_lr, 10% (3e-5)"),
        (["schedule.cooldown=0.5%"], "schedule.cooldown", "ends before the warmup, 1% (200,000 tokens)"),
        (["schedule.warmup=2000 steps"], "schedule.cooldown", "60% (12,000,000 tokens) ends before the warmup"),
        (["schedule={kind: wsd, warmup: 60%, decay: 50%}"], "schedule.decay", "exceed the stage (20,000,000 tokens)"),
        (["schedule={kind: anneal}"], "schedule.kind", "set stage.kind to anneal"),
        (["stage.kind=anneal"], "schedule.kind", "a stage of kind anneal needs schedule.kind anneal, not infinite"),
        (["stage.kind=anneal", "schedule={kind: anneal, min_lr: 0}"], "schedule.min_lr", "never reaches 0"),
        (["stage.mixture.english.weight=0"], "stage.mixture", "all weights are 0"),
        (["stage.replay.share=100%"], "stage.replay.share", "at 100% the stage would see nothing new"),
        (["stage.mixture.english.weight=-1"], "stage.mixture.english.weight", "this must be at least 0"),
        (["checkpoint.every=0 steps"], "checkpoint.every", "this must be more than zero"),
        (["checkpoint.keep_every=0%"], "checkpoint.keep_every", "this must be more than zero"),
        (["batch.sequences=0"], "batch.sequences", "this must be at least 1"),
        (["optim.beta2=1"], "optim.beta2", "this must be below 1"),
        (["optim.peak_lr=0"], "optim.peak_lr", "this must be above 0"),
        (["seed=4294967296"], "seed", "this must be at most 4294967295"),
        (["run="], "run", "this must be a path"),
        (["run=''"], "run", "this must be a path, not an empty text"),
        (["tokenizer=''"], "tokenizer", "this must not be empty; write for example `tokenizer: bytes`"),
    ],
)
def test_values_that_contradict(overrides: list[str], key: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_run(*overrides)
    message = str(caught.value)
    assert f": {key}: " in message
    assert reason in message
    assert len(message.splitlines()) == 1


def test_contradictions_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        make_run("schedule.constant_lr=5%", "schedule.cooldown=0", "stage.kind=anneal")
    keys = [line.split(": ")[1] for line in str(caught.value).splitlines()]
    assert keys == ["schedule.constant_lr", "schedule.cooldown", "schedule.kind"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule.min_lr=55%"],
        ["schedule.constant_lr=100%"],
        ["schedule.warmup=0", "schedule.cooldown=0"],
        ["schedule.cooldown=1%"],
        ["schedule={kind: wsd, warmup: 50%, decay: 50%}"],
        ["schedule={kind: constant, warmup: 0}"],
        ["schedule={kind: cosine, min_lr: 0}"],
        ["stage.kind=anneal", "schedule={kind: anneal, shape: linear, min_lr: 0}"],
        ["stage.replay.share=99%"],
    ],
)
def test_values_at_their_limits(overrides: list[str]) -> None:
    assert isinstance(make_run(*overrides), RunConfig)


def test_a_constant_schedule_needs_no_lowest_rate() -> None:
    assert isinstance(make_run("schedule={kind: constant}").schedule, ConstantSchedule)


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (["schedule={kind: trilm, second_lr: 4e-4}"], "schedule.second_lr", "4e-4 is above optim.peak_lr, 3e-4"),
        (["schedule={kind: trilm, second_lr: 5%, min_lr: 10%}"], "schedule.second_lr", "is below schedule.min_lr"),
        (["schedule={kind: wsd, decay_shape: reciprocal, min_lr: 0}"], "schedule.min_lr", "a reciprocal decay never"),
        (["schedule={kind: wsd_s, min_lr: 0}"], "schedule.min_lr", "take another schedule.decay_shape"),
        (["schedule={kind: wsd_s, releases: [50%, 40%]}"], "schedule.releases", "40% is not behind the one before"),
        (["schedule={kind: wsd_s, releases: [1%], warmup: 2%}"], "schedule.releases", "before the warmup ends"),
        (["schedule={kind: cosine, sampling: 0 steps}"], "schedule.sampling", "this must be more than zero"),
        (["optim.peaks=[100%, 50%]", "optim.peak_decay=0.5"], "optim.peak_decay", "remove one of both"),
        (["optim.peaks=[0]"], "optim.peaks", "a peak of 0 trains nothing"),
        (["optim.peak_decay=1.5"], "optim.peak_decay", "at most 1"),
    ],
)
def test_schedules_over_stages_that_contradict(overrides: list[str], key: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_run(*overrides)
    assert f": {key}: " in str(caught.value)
    assert reason in str(caught.value)


def test_lists_survive_a_dump() -> None:
    run = make_run("schedule={kind: wsd_s, releases: [25%, 50%, 20M tokens]}", "optim.peaks=[100%, 1e-4]")
    written = dump(run)
    assert "25%" in written
    assert run_from_mapping(yaml.safe_load(written)) == run
