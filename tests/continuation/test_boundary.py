"""What is kept at a boundary, what may change, and what is refused with a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megacpt.config import load_run
from megacpt.continuation.boundary import (
    RUN,
    START,
    annealed_config,
    continued_config,
    create_run,
    first_ledger,
    started,
)
from megacpt.continuation.ledger import Ledger
from megacpt.continuation.resume import check_resume, parent_of
from megacpt.errors import CheckpointError, ConfigError
from megacpt.optim.schedules import schedule_from_dict
from tests.continuation.conftest import Finish, stage
from tests.small import STEP, run_config

Streams = dict[str, str]
COSINE = {"kind": "cosine", "warmup": "1 steps"}


def _rate(ledger: Ledger, step: int, steps: int) -> float:
    record = ledger.stage
    return schedule_from_dict(record.schedule).rate(step * STEP, steps * STEP, record.entry_rate)


# Schedules at a boundary.


def test_a_trunk_goes_on_with_its_schedule(english: Path, streams: Streams, tmp_path: Path, finish: Finish) -> None:
    before = Ledger.read(english)
    second = finish(stage(tmp_path / "second", {"python": streams["python"]}), english)
    start = started(tmp_path / "second")
    assert start is not None
    assert (start.parent, start.parent_path) == (before.id, str(english.resolve()))
    assert start.stages[:-1] == before.stages
    assert start.stage.schedule == {**before.stage.schedule, "offset": 8 * STEP}
    assert start.stage.entry_rate == before.stage.rate == 5.5e-3
    assert (_rate(start, 1, 4), _rate(start, 4, 4)) == (5.5e-3, 5.5e-3)
    third = first_ledger(stage(tmp_path / "third", {"c": streams["c"]}), second)
    assert third.stage.schedule["offset"] == 12 * STEP
    assert [record.name for record in third.stages] == ["first", "second", "third"]


def test_a_trunk_stopped_in_its_cooldown_goes_on_with_it(streams: Streams, tmp_path: Path, finish: Finish) -> None:
    config = run_config(tmp_path / "run", {"english": streams["english"]}, steps=8)
    half = finish(config, steps=3)
    start = first_ledger(stage(tmp_path / "next", {"python": streams["python"]}), half)
    uninterrupted = first_ledger(config, None)
    assert [_rate(start, n, 4) for n in (1, 2, 3)] == [_rate(uninterrupted, 3 + n, 8) for n in (1, 2, 3)]
    assert _rate(start, 1, 4) < _rate(uninterrupted, 3, 8)


@pytest.mark.parametrize(
    "change",
    [{"optim": {"peak_lr": 2e-2}}, {"schedule": {"kind": "infinite", "warmup": "2 steps", "cooldown": "3 steps"}}],
)
def test_another_peak_or_schedule_begins_anew(
    english: Path, streams: Streams, tmp_path: Path, change: dict[str, Any]
) -> None:
    start = first_ledger(stage(tmp_path / "next", {"python": streams["python"]}, **change), english)
    assert start.stage.schedule["offset"] == 0


def test_a_schedule_with_a_horizon_begins_anew(streams: Streams, tmp_path: Path, finish: Finish) -> None:
    schedule = {"kind": "cosine", "warmup": "10 steps"}
    first = finish(run_config(tmp_path / "cosine", {"english": streams["english"]}, 20, schedule=schedule))
    assert Ledger.read(first).stage.phase == "done"
    start = first_ledger(stage(tmp_path / "next", {"python": streams["python"]}, 20, schedule=schedule), first)
    assert start.stage.schedule["offset"] == 0
    assert start.stage.entry_rate == pytest.approx(1e-3)


@pytest.fixture
def annealed(english: Path, finish: Finish, tmp_path: Path) -> Path:
    """A release branch of the english trunk."""
    config, parent = annealed_config(english, "50%", tmp_path / "release", [])
    assert parent == english
    return finish(config, english)


def test_an_annealed_branch_does_not_jump(annealed: Path, english: Path, streams: Streams, tmp_path: Path) -> None:
    config = stage(tmp_path / "next", {"python": streams["python"]}, schedule={"kind": "constant", "warmup": "0%"})
    with pytest.raises(ConfigError) as error:
        first_ledger(config, annealed)
    assert str(error.value) == (
        f"schedule: {annealed} is annealed (its rate went down to 0.001), and the stage would start at 0.01, a jump "
        f"that forgets. Continue the trunk instead ({english}), or re-warm: schedule.kind=rewarmed_cosine"
    )
    first_ledger(config, english)  # the trunk takes the same stage


def test_nor_does_a_decayed_one_without_a_parent(streams: Streams, tmp_path: Path, finish: Finish) -> None:
    cosine = finish(run_config(tmp_path / "cosine", {"english": streams["english"]}, schedule=COSINE))
    config = stage(tmp_path / "next", {"python": streams["python"]}, schedule=COSINE)
    with pytest.raises(ConfigError, match=r"is annealed \(.*0\.001\).* start at 0\.01, .*\(its parent\)"):
        first_ledger(config, cosine)


def test_an_annealed_branch_is_rewarmed_with_a_warning(
    annealed: Path, streams: Streams, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = {"kind": "rewarmed_cosine", "warmup": "2 steps"}
    config = stage(tmp_path / "next", {"python": streams["python"]}, steps=8, schedule=schedule)
    start = first_ledger(config, annealed)
    assert f"{annealed} is annealed: its rate, 0.001, goes up again, and some is forgotten by it" in caplog.text
    assert start.stage.entry_rate == pytest.approx(1e-3)
    assert _rate(start, 1, 8) == pytest.approx((1e-3 + 1e-2) / 2)
    assert _rate(start, 2, 8) == pytest.approx(1e-2)


def test_rewarming_within_no_step_is_a_jump(annealed: Path, streams: Streams, tmp_path: Path) -> None:
    schedule = {"kind": "rewarmed_cosine", "warmup": 0}
    with pytest.raises(ConfigError, match="a jump that forgets"):
        first_ledger(stage(tmp_path / "next", {"python": streams["python"]}, schedule=schedule), annealed)


def test_other_levels_are_said_to_be_another_function(
    english: Path, streams: Streams, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = stage(tmp_path / "next", {"python": streams["python"]}, model={"quantise": {"grid": "ternary"}})
    start = first_ledger(config, english)
    assert "model.quantise changes (float -> ternary): the weights go on as they are" in caplog.text
    assert start.stage.changes["model.quantise.grid"] == [None, "ternary"]
    assert start.model["quantise"]["grid"] == "ternary"
    caplog.clear()
    first_ledger(stage(tmp_path / "same", {"python": streams["python"]}), english)
    assert "model.quantise" not in caplog.text


def test_annealing(english: Path, tmp_path: Path) -> None:
    trunk = load_run(english / RUN)
    config, parent = annealed_config(english.parent.parent, "25%", tmp_path / "release", ["seed=7"])
    assert parent == english
    assert (config.stage.name, config.stage.kind, int(config.stage.tokens)) == ("first-anneal", "anneal", 2 * STEP)
    assert config.stage.mixture == trunk.stage.mixture
    assert (config.run, config.seed) == (tmp_path / "release", 7)
    start = first_ledger(config, parent)
    assert start.stage.schedule["kind"] == "anneal"
    assert start.stage.plan.sources[0].segments[0].start == 64
    assert _rate(start, 0, 2) == 5.5e-3
    assert _rate(start, 2, 2) == pytest.approx(1e-3)


def test_annealing_what_is_annealed_has_no_room(annealed: Path, tmp_path: Path) -> None:
    config, parent = annealed_config(annealed, "50%", tmp_path / "again", ["schedule.min_lr=20%"])
    with pytest.raises(ConfigError, match=r"schedule\.min_lr: 0\.002 is above the rate 0\.001 .*nothing to anneal"):
        first_ledger(config, parent)


@pytest.mark.parametrize("tokens", ["half", "-3 steps", "200%", "12"])
def test_a_length_of_the_branch_that_is_none(english: Path, tmp_path: Path, tokens: str) -> None:
    with pytest.raises(ConfigError, match=rf"--tokens: '{tokens}'"):
        annealed_config(english, tokens, tmp_path / "release", [])


# What a stage may not change.


def test_another_tokenizer_is_refused(english: Path, streams: Streams, tmp_path: Path) -> None:
    from megacpt.data.train_tokenizer import train_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789\n" * 50)
    train_tokenizer([text], 300, tmp_path / "pieces")
    config = stage(tmp_path / "next", {"python": streams["python"]}, tokenizer=str(tmp_path / "pieces"))
    with pytest.raises(ConfigError, match=r"tokenizer: the checkpoint was trained with bytes .* a stage cannot change"):
        first_ledger(config, english)


def test_a_stage_file_is_laid_over_the_run(english: Path, streams: Streams, tmp_path: Path) -> None:
    file = tmp_path / "stage.yaml"
    file.write_text(f"stage: {{name: python, tokens: 640, mixture: {{python: {streams['python']}}}}}\n")
    config, parent = continued_config(english.parent.parent, file, tmp_path / "next", ["batch.microbatch=4"])
    assert parent == english
    trunk = load_run(english / RUN)
    assert (config.stage.name, config.run, config.batch.microbatch) == ("python", tmp_path / "next", 4)
    assert (config.model, config.optim, config.schedule) == (trunk.model, trunk.optim, trunk.schedule)


# The start of a run, and its resume.


def test_a_run_folder_is_what_it_was_started_with(english: Path, streams: Streams, tmp_path: Path) -> None:
    config = stage(tmp_path / "next", {"python": streams["python"]})
    assert started(config.run) is None
    start = first_ledger(config, english)
    create_run(config, start)
    assert load_run(config.run / RUN) == config
    assert started(config.run) == start
    assert parent_of(start) == english.resolve()
    check_resume(config, start, english)
    check_resume(config, start, None)


def test_a_damaged_start(english: Path) -> None:
    run = english.parent.parent
    (run / START).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=rf"{START} is no ledger"):
        started(run)


def test_a_parent_that_is_gone(english: Path, streams: Streams, tmp_path: Path) -> None:
    start = first_ledger(stage(tmp_path / "next", {"python": streams["python"]}), english)
    english.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"step-00000008 is gone: it is the checkpoint that this run starts from"):
        parent_of(start)
