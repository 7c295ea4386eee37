"""Streams, and ledgers of runs that were planned but need no training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megacpt.config import RunConfig, dump
from megacpt.continuation.boundary import RUN, create_run, first_ledger
from megacpt.continuation.ledger import LEDGER, Ledger
from megacpt.data.stage_data import StageData
from megacpt.optim.schedules import schedule_from_dict
from tests.small import STEP, make_streams, run_config

Finish = Callable[..., Path]


@pytest.fixture(scope="session")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of streams by name."""
    return make_streams(tmp_path_factory.mktemp("streams"))


def after(config: RunConfig, start: Ledger, steps: int) -> Ledger:
    """The ledger after `steps` optimizer steps of a stage."""
    plan, schedule = start.stage.plan, schedule_from_dict(start.stage.schedule)
    data = StageData(plan)
    counts = data.counts(steps * config.batch.sequences)
    position = steps * config.tokens_per_step, config.stage_steps * config.tokens_per_step, start.stage.entry_rate
    return start.with_stage(
        tokens=steps * config.tokens_per_step,
        steps=steps,
        consumed={s.name: n * plan.seq_length for s, n in zip(plan.sources, counts, strict=True)},
        repeats={s.name: n / data.distinct(i) for i, (s, n) in enumerate(zip(plan.sources, counts, strict=True))},
        rate=schedule.rate(*position),
        phase=schedule.phase(*position),
        layouts=("tp1 pp1 cp1 dp1",),
        seconds=1.5,
    )


def finish_run(config: RunConfig, parent: Path | None = None, steps: int | None = None) -> Path:
    """Make the run folder of a stage with a checkpoint (without tensors) after some steps; return the checkpoint.

    Without `steps`, after all of the stage.
    """
    start = first_ledger(config, parent)
    create_run(config, start)
    done = config.stage_steps if steps is None else steps
    checkpoint = config.run / "checkpoints" / f"step-{done:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / LEDGER).write_text(after(config, start, done).to_json())
    (checkpoint / RUN).write_text(dump(config))
    (checkpoint / "manifest.json").write_text('{"format": 1, "files": {}}')
    return checkpoint


@pytest.fixture
def finish() -> Finish:
    """Return the function `finish_run`."""
    return finish_run


@pytest.fixture
def english(streams: dict[str, str], finish: Finish, tmp_path: Path) -> Path:
    """A checkpoint of a first stage of 8 steps on english, under the infinite schedule."""
    return finish(run_config(tmp_path / "english", {"english": streams["english"]}, steps=8))


def stage(run: Path, mixture: dict[str, Any], steps: int = 4, **changes: Any) -> RunConfig:
    """A second stage; `replay` is a key of the stage, the rest are sections."""
    replay = {"replay": changes.pop("replay")} if "replay" in changes else {}
    named = {"stage": {"name": run.name, "tokens": steps * STEP, "mixture": mixture, **replay}}
    return run_config(run, mixture, **{**named, **changes})
