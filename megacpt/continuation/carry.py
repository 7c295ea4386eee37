"""What becomes of a checkpoint's state at a boundary: in the ledger when a stage begins, done when it loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megacpt.checkpoint.store import load_checkpoint
from megacpt.config import RunConfig
from megacpt.continuation.ledger import Ledger, StageRecord
from megacpt.continuation.upcycle import load_upcycled
from megacpt.engine.protocol import Engine
from megacpt.optim.moments import Carry

# The running means of each optimizer: what the configuration calls them, their name in its state, and their decay.
MEANS: dict[str, dict[str, tuple[str, str]]] = {
    "adamw": {"first_moment": ("exp_avg", "beta1"), "second_moment": ("exp_avg_sq", "beta2")},
    "lion": {"first_moment": ("exp_avg", "beta2")},
}


def carry_record(config: RunConfig, before: Ledger | None) -> dict[str, Any]:
    """Return what becomes of the optimizer's state, as the ledger keeps it.

    Args:
        config: the run of the stage.
        before: what the parent has seen; None for a first stage.

    Returns:
        Empty for a first stage. Else ``optimizer``: its kind before and after (null before, where the parent's weights
        were not made by training); and by mean of the new optimizer ``factor``, as `Carry.factor` and 0 where the
        parent has no such mean, and ``decay`` before and after. Where MLPs become experts, ``upcycle`` says how.
    """
    if before is None:
        return {}
    old = {} if before.weights_alone else before.stage.optimizer
    kind = old.get("optimizer")
    had = MEANS.get(str(kind), {})
    found: dict[str, Any] = {"optimizer": [kind, config.optim.optimizer]}
    for mean, (_, key) in MEANS[config.optim.optimizer].items():
        after = getattr(config.optim, key)
        if mean in had:
            found[mean] = {"factor": getattr(config.stage.carry, mean), "decay": [old[had[mean][1]], after]}
        else:
            found[mean] = {"factor": 0.0, "decay": [after, after]}
    if config.stage.carry.upcycle is not None:
        found["upcycle"] = config.stage.carry.upcycle
    return found


def load_parent(folder: Path, engine: Engine, start: Ledger) -> None:
    """Load the checkpoint that a stage begins on, as the record of the stage says; every rank calls this.

    Args:
        folder: the checkpoint.
        engine: of the stage.
        start: the ledger at the start of the stage.

    Raises:
        CheckpointError: if the checkpoint is damaged or holds another model; names the file.
    """
    upcycle = start.stage.carry.get("upcycle")
    if upcycle is None:
        load_checkpoint(folder, engine, boundary=True)
    else:
        load_upcycled(folder, engine, start.model["layers"], upcycle)
    apply_carry(engine, start.stage)


def apply_carry(engine: Engine, record: StageRecord) -> None:
    """Do what the record of a stage says to the optimizer's state, after its parent's checkpoint was loaded.

    Args:
        engine: of the stage.
        record: of the stage.
    """
    means = MEANS[record.optimizer["optimizer"]]
    engine.carry(
        {
            name: Carry(record.carry[mean]["factor"], *record.carry[mean]["decay"])
            for mean, (name, _) in means.items()
            if mean in record.carry
        }
    )
