"""What the loop hands to the engine at each step: rate and weight decay, as the schedule in the ledger says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from megacpt.continuation.boundary import first_ledger
from megacpt.data.stage_data import StageData
from megacpt.engine.protocol import Batch, StepReport
from megacpt.train.loop import Run, train_loop
from tests.small import make_stream, run_config


class Recorder:
    """An engine of one rank that trains nothing."""

    data_rank, data_size, microbatch_multiple = 0, 1, 1

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def train_step(self, batches: Sequence[Batch], rate: float, weight_decay: float) -> StepReport:
        self.seen.append((rate, weight_decay))
        return StepReport(1.0, len(batches), 1.0, False)


def recorded(folder: Path, **changes: Any) -> list[tuple[float, float]]:
    config = run_config(folder / "run", {"english": str(make_stream(folder / "streams", "english"))}, **changes)
    start = first_ledger(config, None)
    engine = Recorder()
    run = Run(config, cast(Any, engine), cast(Any, None), StageData(start.stage.plan), start, cast(Any, None), "one")
    train_loop(run, [])
    return engine.seen


def test_two_steps_of_trilm_reach_the_engine(tmp_path: Path) -> None:
    schedule = {"kind": "trilm", "warmup": 0, "second_lr": 6e-3, "weight_decay_until": "4 steps"}
    seen = recorded(tmp_path, steps=6, schedule=schedule, optim={"weight_decay": 0.3})
    line = [1 - step / 6 for step in range(1, 7)]
    assert [decay for _, decay in seen] == [0.3, 0.3, 0.3, 0.3, 0.0, 0.0]
    for step, (rate, _) in enumerate(seen):
        assert abs(rate - (1e-2 if step < 3 else 6e-3) * line[step]) < 1e-15


def test_a_sampled_profile_gives_equal_stairs(tmp_path: Path) -> None:
    schedule = {"kind": "linear", "warmup": 0, "min_lr": 0, "sampling": "2 steps"}
    rates = [rate for rate, _ in recorded(tmp_path, steps=6, schedule=schedule)]
    assert rates[0::2] == rates[1::2]
    assert len(set(rates)) == 3
