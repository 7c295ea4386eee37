"""Schedules over several stages: releases from the peak, and peaks that depend on the stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megacpt.continuation.boundary import annealed_config, first_ledger
from megacpt.continuation.ledger import Ledger
from megacpt.errors import ConfigError
from megacpt.optim.schedules import schedule_from_dict
from tests.continuation.conftest import Finish, stage
from tests.small import STEP, run_config

Streams = dict[str, str]
RELEASES = {"kind": "wsd_s", "warmup": "2 steps", "releases": ["4 steps", "100%"], "decay": "2 steps"}
RELEASED = {**RELEASES, "decay": "1 steps"}


def _rates(ledger: Ledger, steps: int) -> list[float]:
    record = ledger.stage
    schedule = schedule_from_dict(record.schedule)
    return [schedule.rate(n * STEP, steps * STEP, record.entry_rate) for n in range(1, steps + 1)]


def test_a_stage_after_a_release_starts_at_the_peak(streams: Streams, tmp_path: Path, finish: Finish) -> None:
    first = finish(run_config(tmp_path / "first", {"english": streams["english"]}, 8, schedule=RELEASED))
    assert Ledger.read(first).stage.phase == "done"
    assert Ledger.read(first).stage.rate == 1e-3
    second = first_ledger(stage(tmp_path / "second", {"python": streams["python"]}, 8, schedule=RELEASED), first)
    assert _rates(second, 8) == [1e-2, 1e-2, 1e-2, 1e-3, 1e-2, 1e-2, 1e-2, 1e-3]


def test_a_warmup_that_was_cut_short_is_made_again(streams: Streams, tmp_path: Path, finish: Finish) -> None:
    config = run_config(tmp_path / "first", {"english": streams["english"]}, 8, schedule=RELEASES)
    first = finish(config, steps=1)
    second = first_ledger(stage(tmp_path / "second", {"python": streams["python"]}, 8, schedule=RELEASES), first)
    assert _rates(second, 8)[:2] == [5e-3, 1e-2]


@pytest.mark.parametrize(
    ("optim", "peaks"),
    [
        ({"peak_lr": 1e-2}, [1e-2, 1e-2, 1e-2]),
        ({"peak_lr": 1e-2, "peak_decay": 0.5}, [1e-2, 5e-3, 2.5e-3]),
        ({"peak_lr": 1e-2, "peaks": ["100%", 4e-3, "20%"]}, [1e-2, 4e-3, 2e-3]),
    ],
)
def test_the_peak_of_each_stage(
    streams: Streams, tmp_path: Path, finish: Finish, optim: dict[str, Any], peaks: list[float]
) -> None:
    schedule = {"kind": "cosine", "warmup": "8 steps"}
    parent = None
    for number, peak in enumerate(peaks):
        config = stage(tmp_path / str(number), {"english": streams["english"]}, 16, schedule=schedule, optim=optim)
        start = first_ledger(config, parent)
        assert max(_rates(start, 16)) == start.stage.schedule["peak"] == peak
        assert _rates(start, 16)[-1] == pytest.approx(peak / 10)
        assert Ledger.from_json(start.to_json()).stage == start.stage
        json.dumps(start.stage.optimizer)
        parent = finish(config, parent)


def test_a_lower_peak_begins_an_infinite_schedule_anew(english: Path, streams: Streams, tmp_path: Path) -> None:
    optim = {"peak_lr": 1e-2, "peak_decay": 0.5}
    start = first_ledger(stage(tmp_path / "next", {"python": streams["python"]}, 8, optim=optim), english)
    assert (start.stage.schedule["offset"], start.stage.schedule["peak"]) == (0, 5e-3)


def test_a_branch_refers_to_the_peak_of_its_trunk(streams: Streams, tmp_path: Path, finish: Finish) -> None:
    optim = {"peak_lr": 1e-2, "peak_decay": 0.5}
    trunk = None
    for number in range(2):
        trunk = finish(stage(tmp_path / str(number), {"english": streams["english"]}, 8, optim=optim), trunk)
    assert trunk is not None
    config, parent = annealed_config(trunk, "50%", tmp_path / "release", [])
    assert first_ledger(config, parent).stage.schedule["minimum"] == 5e-4


def test_a_list_that_is_too_short_says_so(english: Path, streams: Streams, tmp_path: Path) -> None:
    config = stage(tmp_path / "next", {"python": streams["python"]}, optim={"peaks": ["100%"]})
    with pytest.raises(ConfigError, match=r"optim\.peaks: 1 rates, and this is stage 2"):
        first_ledger(config, english)
