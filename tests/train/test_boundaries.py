"""Stages that change what a stage may change, trained: exact over kills and layouts, and recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megacpt.checkpoint.store import checkpoints
from tests.pool import Pools
from tests.small import STEP, run_mapping
from tests.train.conftest import Session, ledger, weights

Streams = dict[str, str]
STEPS = 4
LION = {"optimizer": "lion", "beta2": 0.99, "peak_lr": 1e-3}
LONGER = {"max_seq_length": 256, "rope": {"base": 100000.0, "scaling": {"kind": "llama3", "original_length": 64}}}
# What the second stage of a lineage changes, and a layout other than one process that trains it.
STAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "partly reset": ({"stage": {"carry": {"first_moment": 0.5, "second_moment": 0.25}}}, {"tensor": 2}),
    "second reset": ({"stage": {"carry": {"second_moment": 0}}}, {"pipeline": 2}),
    "lion": ({"optim": LION}, {"distributed_optimizer": True}),
    "frozen": ({"optim": {"freeze": ["embeddings", "layers:1"]}}, {"pipeline": 2}),
    "longer context": (
        {
            "model": LONGER,
            "batch": {"seq_length": 128, "sequences": 2, "microbatch": 1},
            "stage": {"tokens": STEPS * 2 * 128},
        },
        {"distributed_optimizer": True},
    ),
}


def _config(run: Path, streams: Streams, **changes: Any) -> dict[str, Any]:
    named = {"name": run.name, "tokens": STEPS * STEP, "mixture": {"python": streams["python"]}}
    changes["stage"] = {**named, **changes.get("stage", {})}
    return run_mapping(run, {}, **changes)


@pytest.fixture(scope="module")
def trunk(session: Session, streams: Streams, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint of a first stage."""
    run = tmp_path_factory.mktemp("trunk") / "run"
    first = session(run_mapping(run, {"english": streams["english"]}, STEPS))
    return str(first["checkpoint"])


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_ends_as_if_it_had_not_been(
    pools: Pools, session: Session, streams: Streams, trunk: str, tmp_path: Path, name: str
) -> None:
    changes, parallel = STAGES[name]
    for layout in ({}, parallel):
        folder = tmp_path / ("other" if layout else "alone")
        ranks = 2 if layout else 1
        whole = session(_config(folder / "whole", streams, **changes, parallel=layout), ranks, parent=trunk)
        killed = _config(folder / "killed", streams, **changes, parallel=layout)
        assert session(killed, ranks, parent=trunk, at=4, how="crash")["crashed"]
        resumed = session(killed, ranks)
        assert resumed["complete"], resumed["error"]
        assert weights(pools, resumed["checkpoint"], **changes) == weights(pools, whole["checkpoint"], **changes)
        for key in ("carry", "changes"):
            assert getattr(ledger(resumed).stage, key) == getattr(ledger(whole).stage, key)


def test_three_stages_in_three_layouts(
    pools: Pools, session: Session, streams: Streams, trunk: str, tmp_path: Path
) -> None:
    """Partly reset in one, frozen with Lion in the next, all trained by Adam in the third: what is frozen stays."""
    frozen = {"optim": {**LION, "freeze": ["embeddings", "norms"]}}
    second = session(
        _config(tmp_path / "2", streams, parallel={"pipeline": 2}, stage={"carry": {"first_moment": 0}}),
        2,
        parent=trunk,
    )
    third = session(
        _config(tmp_path / "3", streams, parallel={"distributed_optimizer": True}, **frozen),
        2,
        parent=second["checkpoint"],
    )
    fourth = session(
        _config(tmp_path / "4", streams, parallel={"tensor": 2, "sequence": True}), 2, parent=third["checkpoint"]
    )
    assert fourth["complete"], fourth["error"]
    before, middle, after = (weights(pools, stage["checkpoint"], **frozen) for stage in (second, third, fourth))
    kept = {name for name in before if "/" not in name and before[name] == middle[name]}
    assert kept == {name for name in before if "/" not in name and ("embedding" in name or "norm" in name)}
    assert not {name for name in kept if middle[name] == after[name]}
    found = [ledger(stage).stage.carry["optimizer"] for stage in (second, third, fourth)]
    assert found == [["adamw", "adamw"], ["adamw", "lion"], ["lion", "adamw"]]


def test_weights_without_an_optimizer_are_continued(
    pools: Pools, session: Session, streams: Streams, trunk: str, tmp_path: Path
) -> None:
    (alone,) = pools(1).run("tests.train.cases:weights_alone", folder=trunk, out=str(tmp_path / "average"))
    assert not any("optimizer" in name for name in alone["stored"])
    cold = _config(tmp_path / "cold", streams, schedule={"kind": "constant", "warmup": 0})
    assert "Let it warm up" in session(cold, parent=alone["checkpoint"])["error"][2]
    warm = _config(tmp_path / "warm", streams, parallel={"distributed_optimizer": True})
    first = session(warm, 2, parent=alone["checkpoint"])
    assert first["complete"], first["error"]
    assert ledger(first).derived is None
    # Nothing went on but the weights: as with both moments reset.
    reset = _config(tmp_path / "reset", streams, stage={"carry": {"first_moment": 0, "second_moment": 0}})
    reset["schedule"] = {**reset["schedule"], "min_lr": "11%"}  # so that it begins anew, as the other does
    other = session({**reset, "parallel": {"distributed_optimizer": True}}, 2, parent=trunk)
    assert weights(pools, other["checkpoint"]) == weights(pools, first["checkpoint"])


def test_a_resume_wants_the_whole_optimizer(
    pools: Pools, session: Session, streams: Streams, trunk: str, tmp_path: Path
) -> None:
    """What a boundary lets begin anew is an error in the middle of a stage."""
    lion = session(_config(tmp_path / "lion", streams, optim=LION), parent=trunk)
    (said,) = pools(1).run("tests.checkpoint.cases:load_error", folder=lion["checkpoint"])
    assert said.startswith("CheckpointError")
    assert "does not fit this model" in said
    assert len(checkpoints(tmp_path / "lion")) == 2
