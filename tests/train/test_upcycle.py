"""A dense checkpoint becomes a model with experts: the same function in every layout, and exact from there on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pool import Pools
from tests.small import STEP, run_mapping
from tests.train.conftest import Session, ledger, weights

CASES = "tests.train.upcycle_cases:"
Streams = dict[str, str]
COPY = {"experts": 4, "top_k": 2, "renormalise": True}
SPLIT = {"tensor": 2, "sequence": True}
HOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "copy": ("copy", COPY),
    "copy in groups": ("copy", {**COPY, "score": "sigmoid", "groups": 2, "groups_kept": 1}),
    "copy under Sinkhorn": ("copy", {**COPY, "balance": {"kind": "sinkhorn", "scope": "step"}}),
    "copy in some layers": ("copy", {**COPY, "every": 2, "first_dense": 1}),
    "shared": ("shared", {"experts": 4, "ffn": 24, "shared_ffn": 96, "capacity": 1.0}),
    "shared in some layers": ("shared", {"experts": 4, "shared_ffn": 96, "first_dense": 2}),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, SPLIT),
    "pp2 interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "ep2": (2, {"expert": 2}),
    "tp2 ep2 distopt": (2, {**SPLIT, "expert": 2, "distributed_optimizer": True}),
}
MODELS: dict[str, dict[str, Any]] = {
    "gelu, tied": {"activation": "gelu", "tied_embeddings": True},
    "geglu, norms and biases": {"activation": "geglu", "qk_norm": True, "qkv_bias": True},
}


def _dense(pools: Pools, run: Path, ranks: int = 1, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = pools(ranks).run(CASES + "dense", run=str(run), changes=changes)[0]
    return found


def _same(found: dict[str, Any], dense: dict[str, Any]) -> None:
    assert found["evaluation"] == pytest.approx(dense["evaluation"], rel=1e-6)
    assert found["losses"][0] == pytest.approx(dense["losses"][0], rel=1e-6)


@pytest.fixture(scope="module")
def dense(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A dense checkpoint, and what the model loses next."""
    return _dense(pools, tmp_path_factory.mktemp("dense"))


# Of what differs in few lines, one layout with everything is enough.
@pytest.mark.parametrize("name", HOWS)
def test_the_function_stays_in_every_layout(pools: Pools, dense: dict[str, Any], name: str) -> None:
    how, moe = HOWS[name]
    arguments = {"checkpoint": dense["checkpoint"], "how": how}
    (alone,) = pools(1).run(CASES + "upcycled", **arguments, changes={"model": {"moe": moe}})
    _same(alone, dense)
    for ranks, parallel in LAYOUTS.values() if name == how else [LAYOUTS["tp2 ep2 distopt"]]:
        changes = {"model": {"moe": moe}, "parallel": parallel}
        for found in pools(ranks).run(CASES + "upcycled", **arguments, changes=changes):
            _same(found, dense)
            if "capacity" not in moe:  # which counts the tokens of a microbatch of all ranks
                assert found["losses"] == pytest.approx(alone["losses"], rel=2e-5)  # with the same moments


@pytest.mark.parametrize("name", MODELS)
def test_dense_models_of_any_kind_and_layout(pools: Pools, tmp_path: Path, name: str) -> None:
    for ranks, parallel in ((2, {**SPLIT, "distributed_optimizer": True}), (2, {"pipeline": 2})):
        model = MODELS[name]
        before = _dense(pools, tmp_path / "-".join(parallel), ranks, model=model, parallel=parallel)
        for how in ("copy", "shared"):
            changes = {"model": {**model, "moe": HOWS[how][1]}}
            (found,) = pools(1).run(
                CASES + "upcycled", checkpoint=before["checkpoint"], how=how, changes=changes, steps=1
            )
            _same(found, before)


@pytest.mark.parametrize("how", ["copy", "shared"])
def test_what_becomes_of_every_tensor(pools: Pools, dense: dict[str, Any], how: str) -> None:
    after = {"model": {"moe": {**HOWS[how][1], "first_dense": 1}}}
    (found,) = pools(1).run(CASES + "tensors", checkpoint=dense["checkpoint"], before={}, how=how, after=after)
    old, begun, new = found
    assert begun.keys() == new.keys()
    for name, value in begun.items():
        mlp = old.get(name.replace(".mlp.experts.", ".mlp.").replace(".mlp.shared_experts.", ".mlp."))
        if ".router." in name or (how == "shared" and ".experts.linear_fc1" in name):
            expected = new[name]
        elif ".experts." not in name or (how == "copy" and not name.startswith("optimizer.")):
            assert mlp is not None
            expected = mlp
        else:
            expected = torch.zeros(())
        assert torch.equal(value, expected.expand(value.shape)), name
    carried = {name for name, value in begun.items() if "count" in name and value > 0}
    assert all(float(begun[name]) == 3 for name in carried)
    assert len(carried) == sum("count" in name for name in old) - (3 * 2 * 2 if how == "copy" else 0)


def test_what_the_checkpoint_lacks_begins_anew(pools: Pools, tmp_path: Path) -> None:
    """Parts that were frozen have no moments; neither has Lion a second one."""
    lion = {"optimizer": "lion", "beta2": 0.99, "freeze": ["embeddings", "layers:1-2"]}
    before = _dense(pools, tmp_path, optim=lion)
    after = {"model": {"moe": HOWS["shared"][1]}}
    (found,) = pools(1).run(
        CASES + "tensors", checkpoint=before["checkpoint"], before={"optim": lion}, how="shared", after=after
    )
    _, begun, _ = found
    ages = {name: float(value) for name, value in begun.items() if name.startswith("optimizer.count.")}
    mean, shared = "optimizer.count.exp_avg.", "decoder.layers.{}.mlp.shared_experts.linear_fc1.weight"
    assert ages[f"{mean}embedding.word_embeddings.weight"] == 0
    assert [ages[mean + shared.format(layer)] for layer in range(4)] == [0, 0, 3, 3]
    assert not any(age for name, age in ages.items() if name.startswith("optimizer.count.exp_avg_sq."))


def test_copies_in_bfloat16_have_the_whole_weights_behind_them(pools: Pools, dense: dict[str, Any]) -> None:
    changes = {"model": {"moe": COPY}, "precision": "bfloat16"}
    assert pools(1).run(CASES + "rounded", checkpoint=dense["checkpoint"], how="copy", changes=changes) == [True]


def _config(run: Path, streams: Streams, **changes: Any) -> dict[str, Any]:
    named = {"name": run.name, "tokens": 4 * STEP, "mixture": {"python": streams["python"]}}
    return run_mapping(run, {}, **{**changes, "stage": {**named, **changes.get("stage", {})}})


def test_a_killed_stage_ends_as_if_it_had_not_been(
    pools: Pools, session: Session, streams: Streams, tmp_path: Path
) -> None:
    trunk = session(run_mapping(tmp_path / "trunk", {"english": streams["english"]}, 4))["checkpoint"]
    experts = {"model": {**run_mapping("", {})["model"], "moe": COPY}}
    carry = {"stage": {"carry": {"upcycle": "copy", "second_moment": 0.5}}}
    ends = {}
    # Killed before anything was saved, and after.
    for at, ranks, layout in ((4, 1, {}), (1, 2, {"expert": 2, "distributed_optimizer": True})):
        folder = tmp_path / f"{ranks}"
        whole = session(_config(folder / "whole", streams, **experts, **carry, parallel=layout), ranks, parent=trunk)
        assert whole["complete"], whole["error"]
        killed = _config(folder / "killed", streams, **experts, **carry, parallel=layout)
        assert session(killed, ranks, parent=trunk, at=at, how="crash")["crashed"]
        resumed = session(killed, ranks)
        assert resumed["complete"], resumed["error"]
        ends = weights(pools, resumed["checkpoint"], **experts)
        assert ends == weights(pools, whole["checkpoint"], **experts)
        assert ledger(resumed).stage.carry["upcycle"] == "copy"
        assert ledger(resumed).stage.changes["model.moe.experts"] == [None, 4]
    # The next stage is one like others: its run inherits the experts and not the key.
    third = session(_config(tmp_path / "third", streams, **experts), parent=resumed["checkpoint"])
    assert third["complete"], third["error"]
    assert "upcycle" not in ledger(third).stage.carry
    assert any(weights(pools, third["checkpoint"], **experts)[name] != ends[name] for name in ends)
