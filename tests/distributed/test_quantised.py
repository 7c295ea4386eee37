"""Quantised models give the numbers of a single process in every layout, where their scales are of the same scope."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pools

CASES = "tests.distributed.cases:train"
SPLIT = {"tensor": 2, "sequence": True}
SHARDS = {"scope": "shard", "shards": 2}
# Adam's first steps are signs: without the epsilon, gradients that are nothing but rounding would move weights over the
# border of two levels, one way in one layout and another way in the next.
RATE = {"optim": {"peak_lr": 1e-3, "eps": 1e-5}}
MOE = {"experts": 4, "top_k": 2, "ffn": 48, "shared_ffn": 32}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel": {"tensor": 2}}),
    "tp2 sp": (2, {"parallel": SPLIT}),
    "tp4": (4, {"parallel": {"tensor": 4}}),
    "pp2": (2, {"parallel": {"pipeline": 2}}),
    "pp2 interleaved": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
    "cp2": (2, {"parallel": {"context": 2}}),
    "dp2": (2, {}),
    "dp2 distopt": (2, {"parallel": {"distributed_optimizer": True}}),
    "tp2 dp2 distopt": (4, {"parallel": {**SPLIT, "distributed_optimizer": True}}),
    "microbatch 1": (1, {"batch": {"microbatch": 1}}),
    "recompute full": (1, {"recompute": "full"}),
    "2bit cache": (1, {"quantised_cache": "2bit", "recompute": "full"}),
}
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"parallel": {"expert": 2}}),
    "tp2": (2, {"parallel": SPLIT}),
    "tp2 ep2": (2, {"parallel": {**SPLIT, "expert": 2}}),
    "pp2 ep2": (4, {"parallel": {"pipeline": 2, "expert": 2}}),
    "dp4 ep2 distopt": (4, {"parallel": {"expert": 2, "distributed_optimizer": True}}),
    "fp8 cache": (1, {"quantised_cache": "fp8", "recompute": "full"}),
}
SCALES: dict[str, dict[str, Any]] = {"tensor": {}, "shards": SHARDS, "groups": {"scope": "group", "group": 8}}
# Rounded again and again, activations and fine grids turn the last bits of a sum into other levels now and then.
COARSE: dict[str, dict[str, Any]] = {
    "int8 activations": {"grid": "ternary", "activations": "int8"},
    "fp8 activations": {"grid": "ternary", "activations": "fp8"},
    "quest": {"grid": "quest", "bits": 4, "scale": {"scope": "group", "group": 8}},
    "int": {"grid": "int", "bits": 4, "scale": SHARDS},
    "binary": {"grid": "binary", "scale": SHARDS},
    "bitnet b1.58": {"grid": "ternary", "activations": "int8", "scale": {"rule": "clamp"}},
}
BITNET = {"sub_norm": True, "activation": "relu2glu"}


def _pairs(layouts: Iterable[str]) -> list[tuple[str, str]]:
    """Layouts with scopes: one scale a matrix in all of them, others where a matrix is split, or experts are."""
    return [(name, scale) for name in layouts for scale in SCALES if scale == "tensor" or "tp" in name or "ep" in name]


def _ternary(scale: str, **model: Any) -> dict[str, Any]:
    return {"model": {"quantise": {"grid": "ternary", "scale": SCALES[scale]}, **model}, **RATE}


def _agree(result: dict[str, Any], reference: dict[str, Any]) -> None:
    assert result["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert result["norms"] == pytest.approx(reference["norms"], rel=1e-5)
    assert result["evaluation"] == pytest.approx(reference["evaluation"], rel=1e-5)
    assert result["statistics"] == pytest.approx(reference["statistics"], rel=1e-5)


@pytest.fixture(scope="module")
def references(pools: Pools) -> dict[str, dict[str, Any]]:
    """Five steps of one process, by scope of the scales; with experts too."""
    found = {}
    for scale in SCALES:
        (found[scale],) = pools(1).run(CASES, changes=_ternary(scale))
        (found[f"{scale}, experts"],) = pools(1).run(CASES, changes=_ternary(scale, moe=MOE))
    return found


@pytest.mark.parametrize(("layout", "scale"), _pairs(LAYOUTS))
def test_layout_agrees_with_one_process(
    pools: Pools, references: dict[str, dict[str, Any]], layout: str, scale: str
) -> None:
    ranks, changes = LAYOUTS[layout]
    for result in pools(ranks).run(CASES, changes={**_ternary(scale), **changes}):
        _agree(result, references[scale])


@pytest.mark.parametrize(("layout", "scale"), _pairs(EXPERT_LAYOUTS))
def test_ternary_experts_agree_with_one_process(
    pools: Pools, references: dict[str, dict[str, Any]], layout: str, scale: str
) -> None:
    ranks, changes = EXPERT_LAYOUTS[layout]
    for result in pools(ranks).run(CASES, changes={**_ternary(scale, moe=MOE), **changes}):
        _agree(result, references[f"{scale}, experts"])


@pytest.mark.parametrize("name", COARSE)
def test_other_grids_and_activations_agree(pools: Pools, name: str) -> None:
    model = {"model": {"quantise": COARSE[name], **(BITNET if "bitnet" in name else {})}, **RATE}
    (reference,) = pools(1).run(CASES, changes=model, steps=3)
    for layout in ("tp2 sp", "pp2", "dp2 distopt"):
        ranks, changes = LAYOUTS[layout]
        for result in pools(ranks).run(CASES, changes={**model, **changes}, steps=3):
            assert result["losses"][0] == pytest.approx(reference["losses"][0], rel=1e-5)
            assert result["losses"] == pytest.approx(reference["losses"], rel=1e-3)


@pytest.mark.parametrize("layout", ["tp2 sp", "dp2 distopt", "recompute full", "2bit cache"])
def test_bfloat16(pools: Pools, layout: str) -> None:
    model = {**_ternary("shards"), "precision": "bfloat16"}
    (reference,) = pools(1).run(CASES, changes=model, steps=3)
    (exact,) = pools(1).run(CASES, changes=_ternary("shards"), steps=3)
    assert reference["losses"] == pytest.approx(exact["losses"], rel=1e-2)
    ranks, changes = LAYOUTS[layout]
    for result in pools(ranks).run(CASES, changes={**model, **changes}, steps=3):
        assert result["losses"] == pytest.approx(reference["losses"], rel=5e-3)


@pytest.mark.parametrize("layout", ["tp2 sp", "pp2", "tp2 dp2 distopt"])
def test_layout_writes_what_one_process_reads(
    pools: Pools, references: dict[str, dict[str, Any]], layout: str, tmp_path: Path
) -> None:
    model, saved = _ternary("shards"), str(tmp_path / "checkpoint")
    ranks, changes = LAYOUTS[layout]
    first = pools(ranks).run(CASES, changes={**model, **changes}, steps=2, save=saved)
    (rest,) = pools(1).run(CASES, changes=model, first=2, steps=3, load=saved)
    assert first[0]["losses"] + rest["losses"] == pytest.approx(references["shards"]["losses"], rel=1e-5)


def test_scopes_are_other_functions(references: dict[str, dict[str, Any]]) -> None:
    first = [references[scale]["losses"][0] for scale in SCALES]
    assert len({round(loss, 5) for loss in first}) == len(first)
