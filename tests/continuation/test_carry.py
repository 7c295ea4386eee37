"""What the ledger says becomes of the optimizer's state at a boundary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megacpt.config import run_from_mapping
from megacpt.continuation.boundary import annealed_config, first_ledger, started
from megacpt.continuation.carry import MEANS, apply_carry
from megacpt.engine.plug_in import OPTIMIZERS
from megacpt.errors import ConfigError
from megacpt.optim.moments import Carry
from tests.config.helpers import plain_run
from tests.continuation.conftest import Finish, stage
from tests.small import run_config

Streams = dict[str, str]
LION = {"optimizer": "lion", "beta2": 0.99}


class Recorder:
    """An engine that notes what it is asked to carry."""

    def carry(self, carries: dict[str, Carry]) -> None:
        self.carries = carries


def _carried(record: Any) -> dict[str, Carry]:
    engine: Any = Recorder()
    apply_carry(engine, record)
    found: dict[str, Carry] = engine.carries
    return found


def test_a_first_stage_carries_nothing(streams: Streams, tmp_path: Path) -> None:
    start = first_ledger(run_config(tmp_path / "run", {"english": streams["english"]}), None)
    assert start.stage.carry == {}
    assert _carried(start.stage) == {}


def test_by_default_everything_is_kept(english: Path, streams: Streams, tmp_path: Path) -> None:
    record = first_ledger(stage(tmp_path / "next", {"python": streams["python"]}), english).stage
    assert record.carry == {
        "optimizer": ["adamw", "adamw"],
        "first_moment": {"factor": 1.0, "decay": [0.9, 0.9]},
        "second_moment": {"factor": 1.0, "decay": [0.95, 0.95]},
    }
    assert _carried(record) == {"exp_avg": Carry(1.0, 0.9, 0.9), "exp_avg_sq": Carry(1.0, 0.95, 0.95)}


def test_factors_and_other_decays(english: Path, streams: Streams, tmp_path: Path) -> None:
    named = {"name": "next", "tokens": 512, "mixture": {"python": streams["python"]}}
    section = {**named, "carry": {"first_moment": 0, "second_moment": 0.5}}
    config = run_config(tmp_path / "next", {}, stage=section, optim={"beta2": 0.99})
    record = first_ledger(config, english).stage
    assert _carried(record) == {"exp_avg": Carry(0.0, 0.9, 0.9), "exp_avg_sq": Carry(0.5, 0.95, 0.99)}
    assert record.changes["optim.beta2"] == [0.95, 0.99]
    assert record.changes["stage.carry.second_moment"] == [1.0, 0.5]


def test_to_lion_and_back(english: Path, streams: Streams, tmp_path: Path, finish: Finish) -> None:
    second = finish(stage(tmp_path / "second", {"python": streams["python"]}, optim=LION), english)
    start = started(tmp_path / "second")
    assert start is not None
    assert start.stage.carry == {
        "optimizer": ["adamw", "lion"],
        "first_moment": {"factor": 1.0, "decay": [0.9, 0.99]},
    }
    assert start.stage.changes["optim.optimizer"] == ["adamw", "lion"]
    third = first_ledger(stage(tmp_path / "third", {"c": streams["c"]}), second).stage
    assert third.carry == {
        "optimizer": ["lion", "adamw"],
        "first_moment": {"factor": 1.0, "decay": [0.99, 0.9]},
        "second_moment": {"factor": 0.0, "decay": [0.95, 0.95]},
    }


def test_every_optimizer_says_what_its_means_are() -> None:
    assert MEANS.keys() == OPTIMIZERS.keys()
    for kind, means in MEANS.items():
        assert tuple(name for name, _ in means.values()) == OPTIMIZERS[kind].MOMENTS


def test_a_branch_keeps_what_its_trunk_reset(streams: Streams, english: Path, tmp_path: Path, finish: Finish) -> None:
    named = {"name": "next", "tokens": 512, "mixture": {"python": streams["python"]}, "carry": {"first_moment": 0}}
    trunk = finish(run_config(tmp_path / "next", {}, stage=named), english)
    config, parent = annealed_config(trunk, "50%", tmp_path / "release", [])
    assert first_ledger(config, parent).stage.carry["first_moment"]["factor"] == 1.0


@pytest.mark.parametrize("factor", [-0.1, 1.1])
def test_factors_that_are_none(streams: Streams, tmp_path: Path, factor: float) -> None:
    named = {"name": "a", "tokens": 512, "mixture": {"c": streams["c"]}, "carry": {"first_moment": factor}}
    with pytest.raises(ValidationError, match=r"stage\.carry\.first_moment"):
        run_config(tmp_path / "next", {}, stage=named)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("[embedings]", r"'embedings' is no part of the model: take .*did you mean 'embeddings'"),
        ("[layers:3-2]", "'layers:3-2' is no range of layers"),
        ("[layers:0-2]", "'layers:0-2' is no range of layers"),
        ("[layers:2-5]", "layers:2-5 goes beyond model.layers, which is 4"),
        ("[embeddings, output, norms, attention, mlp]", "nothing is left to train"),
        ("[embeddings, output, norms, 'layers:1-2', 'layers:3-4']", "nothing is left to train"),
    ],
)
def test_parts_that_cannot_be_frozen(parts: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_from_mapping(plain_run(), [f"optim.freeze={parts}"])


def test_a_tied_output_matrix_is_frozen_as_the_embedding() -> None:
    with pytest.raises(ConfigError, match="freeze embeddings"):
        run_from_mapping(plain_run(), ["model.tied_embeddings=true", "optim.freeze=[output]"])
