"""Ledgers of runs that were never planned: for what needs no stream behind them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megacpt.continuation.boundary import RUN, START
from megacpt.continuation.ledger import LEDGER, Ledger, StageRecord
from megacpt.data.plan import Segment, Source, StagePlan

PROJECT = "/gone/project/runs"
STEP = 128


def stage(name: str, steps: int = 4, kind: str = "trunk", run: str | None = None, **changes: Any) -> StageRecord:
    """A stage of some steps on a stream of its own name."""
    source = Source(name, f"/streams/{name}", name * 4, "new", None, 1.0, (Segment(5, 16, 0, None),))
    record = StageRecord(
        name=name,
        kind=kind,
        run=run or f"{PROJECT}/{name}",
        tokens=steps * STEP,
        steps=steps,
        seq_length=16,
        batch=8,
        plan=StagePlan(16, 5, (source,)),
        consumed={name: steps * STEP},
        repeats={name: 0.25 * steps},
        schedule={"kind": "infinite"},
        entry_rate=None,
        rate=0.001,
        phase="constant",
        optimizer={"optimizer": "adamw"},
        precision="float32",
        seed=5,
        layouts=("tp1 pp1 cp1 dp1",),
        versions={"megacpt": "1"},
        seconds=60.0,
    )
    return replace(record, **changes)


def ledger(own: StageRecord, parent: Ledger | None = None, folder: str = "nowhere") -> Ledger:
    """The ledger of a stage that began on the checkpoint of `parent`, which was in a run `folder` of the project."""
    tokenizer = {"spec": "bytes", "fingerprint": "f" * 64, "vocab_size": 257}
    if parent is None:
        return Ledger(None, None, tokenizer, {"layers": 2}, (own,))
    where = f"{PROJECT}/{folder}/checkpoints/step-{parent.stage.steps:08d}"
    return Ledger(parent.id, where, tokenizer, {"layers": 2}, (*parent.stages, own))


def at(found: Ledger, steps: int) -> Ledger:
    """The same stage at another step."""
    if found.stage.steps == steps:
        return found
    name = found.stage.name
    return found.with_stage(
        steps=steps, tokens=steps * STEP, consumed={name: steps * STEP}, repeats={name: 0.25 * steps}
    )


def write(folder: Path, newest: Ledger, steps: tuple[int, ...] | None = None, planned: int = 4) -> Path:
    """Write the run folder of a ledger, with checkpoints (without tensors) at `steps`; by default one, its newest."""
    config = f"stage: {{tokens: {planned * STEP}}}\n"
    folder.mkdir(parents=True)
    (folder / RUN).write_text(config)
    (folder / START).write_text(at(newest, 0).to_json())
    for step in (newest.stage.steps,) if steps is None else steps:
        write_checkpoint(folder / "checkpoints" / f"step-{step:08d}", at(newest, step), config)
    return folder


def write_checkpoint(folder: Path, found: Ledger, config: str = "") -> Path:
    """Write a checkpoint without tensors."""
    folder.mkdir(parents=True)
    (folder / LEDGER).write_text(found.to_json())
    (folder / RUN).write_text(config)
    (folder / "manifest.json").write_text('{"format": 1, "files": {}}')
    return folder
