"""Runs of models with quantised matrices: exact over stops, float weights as latent ones, checkpoints in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pools
from tests.small import STEP, run_mapping
from tests.train.conftest import Session, ledger, metrics, weights

Streams = dict[str, str]
STEPS = 4
TERNARY: dict[str, Any] = {"model": {"quantise": {"grid": "ternary", "scale": {"scope": "shard", "shards": 2}}}}
SIZES = {"kv_heads": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "tp2": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "dp2 distopt, 2bit": (2, {"parallel": {"distributed_optimizer": True}, "quantised_cache": "2bit"}),
    "dp2, 2bit gathered": (2, {"parallel": {"distributed_optimizer": True, "gather": "2bit"}}),
}


def _config(run: Path, stream: str, steps: int = STEPS, **changes: Any) -> dict[str, Any]:
    changes["model"] = {**SIZES, **changes.get("model", {})}
    changes["stage"] = {"name": run.name, "tokens": steps * STEP, **changes.get("stage", {})}
    return run_mapping(run, {"data": stream}, steps, **changes)


@pytest.fixture(scope="module")
def trunk(session: Session, streams: Streams, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a float model."""
    return str(session(_config(tmp_path_factory.mktemp("trunk") / "run", streams["english"]))["checkpoint"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_run_ends_with_the_same_bits(
    pools: Pools, session: Session, streams: Streams, tmp_path: Path, layout: str
) -> None:
    ranks, changes = LAYOUTS[layout]
    whole = session(_config(tmp_path / "whole", streams["english"], **TERNARY, **changes), ranks)
    killed = _config(tmp_path / "killed", streams["english"], **TERNARY, **changes)
    assert session(killed, ranks, at=4, how="crash")["crashed"]
    resumed = session(killed, ranks)
    assert resumed["complete"], resumed["error"]
    model = {"model": {**SIZES, **TERNARY["model"]}}
    assert weights(pools, resumed["checkpoint"], **model) == weights(pools, whole["checkpoint"], **model)
    shown = [[line for line in metrics(tmp_path / run) if line["step"] == STEPS] for run in ("whole", "killed")]
    keys = ("loss", "grad_norm", "quantise/zeros", "quantise/flips", "quantise/layer-2/flips")
    assert [shown[1][0][key] for key in keys] == [shown[0][0][key] for key in keys]
    assert 0 < shown[0][0]["quantise/flips"] < shown[0][0]["quantise/zeros"] < 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_float_model_becomes_ternary_at_a_boundary(
    session: Session, streams: Streams, trunk: str, tmp_path: Path, layout: str
) -> None:
    ranks, changes = LAYOUTS[layout]
    config = _config(tmp_path / "ternary", streams["english"], **TERNARY, **changes)
    found = session(config, ranks, parent=trunk, at=4, how="crash")
    assert found["crashed"], found["error"]
    found = session(config, ranks)
    assert found["complete"], found["error"]
    record = ledger(found).stage.changes
    assert record["model.quantise.grid"] == [None, "ternary"]
    assert record["model.quantise.scale.shards"] == [None, 2]
    assert "model.kv_heads" not in record
    back = session(
        _config(tmp_path / "float", streams["english"], model={"quantise": None}), parent=found["checkpoint"]
    )
    assert back["complete"], back["error"]
    assert ledger(back).stage.changes["model.quantise.grid"] == ["ternary", None]


def test_a_resume_cannot_change_the_levels(session: Session, streams: Streams, tmp_path: Path) -> None:
    session(_config(tmp_path / "run", streams["english"], **TERNARY), at=3, how="stop")
    other = {"quantise": {"grid": "ternary", "scale": {"rule": "clamp"}}}
    refused = session(_config(tmp_path / "run", streams["english"], model=other))
    assert "model.quantise.scale.rule: add -> clamp" in refused["error"][2]
    assert "model.quantise.scale.scope: shard -> tensor" in refused["error"][2]
    free = session(_config(tmp_path / "run", streams["english"], **TERNARY, quantised_cache="fp8"))
    assert free["complete"], free["error"]


def test_a_checkpoint_is_evaluated_and_speaks(pools: Pools, session: Session, streams: Streams, tmp_path: Path) -> None:
    config = _config(tmp_path / "run", streams["english"], steps=8, **TERNARY)
    checkpoint = session(config)["checkpoint"]
    (alone,) = pools(1).run("tests.train.quantised_cases:use", checkpoint=checkpoint, overrides=[])
    assert alone["told"] == alone["expected"]
    assert len(alone["told"]) == 12
    assert alone["sizes"] == [3] * 8  # 0 and the sizes of two shards
    split = pools(2).run("tests.train.quantised_cases:use", checkpoint=checkpoint, overrides=["parallel.tensor=2"])
    for result in split:
        assert result["told"] == alone["told"]
        assert result["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-6)
        assert result["sizes"] == [2] * 8
