"""Layers of experts give the numbers of a single process in every layout: balance losses, gradients and state too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pools

CASES = "tests.distributed.cases:train"
MOE = {"experts": 8, "top_k": 2, "ffn": 48, "shared_ffn": 32}
SPLIT = {"tensor": 2, "sequence": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel": SPLIT}),
    "tp2 ep2": (2, {"parallel": {**SPLIT, "expert": 2}}),
    "pp2 interleaved": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
    "cp2": (2, {"parallel": {"context": 2}}),
    "cp2 ep2": (2, {"parallel": {"context": 2, "expert": 2}}),
    "dp2": (2, {}),
    "ep2": (2, {"parallel": {"expert": 2}}),
    "ep2 distopt": (2, {"parallel": {"expert": 2, "distributed_optimizer": True}}),
    "dp4": (4, {}),
    "ep4": (4, {"parallel": {"expert": 4}}),
    "dp4 ep2 distopt": (4, {"parallel": {"expert": 2, "distributed_optimizer": True}}),
    "tp2 ep2 dp2": (4, {"parallel": {**SPLIT, "expert": 2}}),
    "tp2 ep4 distopt": (4, {"parallel": {**SPLIT, "expert": 4, "distributed_optimizer": True}}),
    "pp2 ep2": (4, {"parallel": {"pipeline": 2, "expert": 2}}),
    "microbatch 1": (1, {"batch": {"microbatch": 1}}),
    "microbatch 4": (1, {"batch": {"microbatch": 4}}),
    "recompute full": (1, {"recompute": "full"}),
}
STRAINED = ("tp2 ep2", "cp2 ep2", "dp4 ep2 distopt", "pp2 ep2", "recompute full")
ANY_BATCH = ("microbatch 1", "microbatch 4")
SIGMOID = {"score": "sigmoid", "renormalise": True}
ROUTERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "sequence": ({"balance": {"kind": "penalty", "scope": "sequence"}}, (*STRAINED, *ANY_BATCH)),
    "microbatch": ({"balance": {"kind": "penalty", "scope": "microbatch"}}, STRAINED),
    "sinkhorn step": ({"balance": {"kind": "sinkhorn", "scope": "step"}}, (*STRAINED, *ANY_BATCH)),
    "bias": ({**SIGMOID, "balance": {"kind": "bias", "sequence_strength": 0.01}}, (*STRAINED, *ANY_BATCH)),
    "groups": ({**SIGMOID, "groups": 4, "groups_kept": 2, "scale": 2.5}, ("tp2 ep2", *ANY_BATCH)),
    "switch": ({"top_k": 1, "shared_ffn": 0}, ("tp2 ep2", "dp4 ep2 distopt", *ANY_BATCH)),
    "some layers": ({"every": 2, "first_dense": 1}, ("tp2 ep2", "pp2 interleaved", "pp2 ep2")),
}
# Balanced over the microbatches that all ranks process at once: the same tokens together, dealt to ranks or not.
AT_ONCE: dict[str, dict[str, Any]] = {
    "sinkhorn data": {"balance": {"kind": "sinkhorn"}},
    "penalty data": {"balance": {"kind": "penalty", "scope": "data"}},
}


def _experts(**changes: Any) -> dict[str, Any]:
    return {"model": {"moe": {**MOE, **changes}}}


def _norms_agree(found: list[float], reference: list[float]) -> None:
    """The first gradient agrees to rounding; Adam's first steps are signs, which blow the rounding up in later ones."""
    assert found[0] == pytest.approx(reference[0], rel=1e-6)
    assert found == pytest.approx(reference, rel=3e-5)


def _agree(pools: Pools, model: dict[str, Any], layout: str, reference: dict[str, Any]) -> None:
    ranks, changes = LAYOUTS[layout]
    for result in pools(ranks).run(CASES, changes={**model, **changes}, steps=3):
        assert result["losses"] == pytest.approx(reference["losses"], rel=1e-6)
        _norms_agree(result["norms"], reference["norms"])
        assert result["evaluation"] == pytest.approx(reference["evaluation"], rel=1e-6)
        for name, value in result["statistics"].items():
            assert value == pytest.approx(reference["statistics"][name], rel=1e-5), name


@pytest.fixture(scope="module")
def reference(pools: Pools) -> dict[str, Any]:
    (result,) = pools(1).run(CASES, changes=_experts(), steps=3)
    return dict(result)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_agrees_with_one_process(pools: Pools, reference: dict[str, Any], layout: str) -> None:
    _agree(pools, _experts(), layout, reference)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_agrees(pools: Pools, name: str) -> None:
    router, layouts = ROUTERS[name]
    (reference,) = pools(1).run(CASES, changes=_experts(**router), steps=3)
    for layout in layouts:
        _agree(pools, _experts(**router), layout, reference)


@pytest.mark.parametrize("name", AT_ONCE)
def test_tokens_that_are_balanced_together_may_be_on_any_rank(pools: Pools, name: str) -> None:
    model = {**_experts(**AT_ONCE[name]), "batch": {"microbatch": 4}}
    (reference,) = pools(1).run(CASES, changes=model, steps=3)
    for ranks, changes in (
        (2, {"batch": {"microbatch": 2}}),
        (4, {"batch": {"microbatch": 1}, "parallel": {"expert": 2}}),
        (2, {"batch": {"microbatch": 4}, "parallel": {**SPLIT, "expert": 2}}),
        (2, {"batch": {"microbatch": 4}, "parallel": {"context": 2}}),
        (4, {"batch": {"microbatch": 2}, "parallel": {"pipeline": 2}}),
    ):
        for result in pools(ranks).run(CASES, changes={**model, **changes}, steps=3):
            assert result["losses"] == pytest.approx(reference["losses"], rel=1e-6)
            _norms_agree(result["norms"], reference["norms"])


@pytest.mark.parametrize("layout", ["tp2 ep2", "dp4 ep2 distopt", "pp2 ep2"])
@pytest.mark.parametrize("balance", ["sinkhorn", "bias"])
def test_layout_writes_what_one_process_reads(pools: Pools, layout: str, balance: str, tmp_path: Path) -> None:
    model = _experts(balance={"kind": balance}, **(SIGMOID if balance == "bias" else {}))
    ranks, changes = LAYOUTS[layout]
    if balance == "sinkhorn":  # the ranks of data parallelism balance their microbatches together
        model["batch"] = {"microbatch": 4}
        changes = {**changes, "batch": {"microbatch": {"tp2 ep2": 4, "dp4 ep2 distopt": 1, "pp2 ep2": 2}[layout]}}
    (reference,) = pools(1).run(CASES, changes=model, steps=4)
    saved = str(tmp_path / "checkpoint")
    first = pools(ranks).run(CASES, changes={**model, **changes}, steps=2, save=saved)
    (rest,) = pools(1).run(CASES, changes=model, first=2, steps=2, load=saved)
    assert first[0]["losses"] + rest["losses"] == pytest.approx(reference["losses"], rel=1e-6)
    _norms_agree(first[0]["norms"] + rest["norms"], reference["norms"])


def test_what_a_router_has_learned_is_in_the_checkpoint(pools: Pools, tmp_path: Path) -> None:
    model = _experts(balance={"kind": "sinkhorn", "scope": "step"})
    (whole,) = pools(1).run(CASES, changes=model, steps=4)
    saved = str(tmp_path / "checkpoint")
    pools(1).run(CASES, changes=model, steps=2, save=saved)
    (rest,) = pools(1).run(CASES, changes=model, first=2, steps=2, load=saved)
    assert (rest["losses"], rest["norms"]) == (whole["losses"][2:], whole["norms"][2:])
    assert any(value != 0 for value in rest["buffers"])
