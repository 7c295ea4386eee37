"""Every layout gives the numbers of a single process: losses, gradient norms, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pools

CASES = "tests.distributed.cases:train"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel": {"tensor": 2}}),
    "tp2 sp": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "pp2": (2, {"parallel": {"pipeline": 2}}),
    "pp2 interleaved": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
    "cp2": (2, {"parallel": {"context": 2}}),
    "dp2": (2, {}),
    "dp2 distopt": (2, {"parallel": {"distributed_optimizer": True}}),
    "tp2 pp2": (4, {"parallel": {"tensor": 2, "pipeline": 2}}),
    "tp2 sp cp2": (4, {"parallel": {"tensor": 2, "sequence": True, "context": 2}}),
    "tp2 dp2 distopt": (4, {"parallel": {"tensor": 2, "distributed_optimizer": True}}),
    "microbatch 1": (1, {"batch": {"microbatch": 1}}),
    "microbatch 4": (1, {"batch": {"microbatch": 4}}),
    "recompute full": (1, {"recompute": "full"}),
    "recompute selective": (1, {"recompute": "selective"}),
    "distopt alone": (1, {"parallel": {"distributed_optimizer": True}}),
}

# Other models and arithmetic, each in the layout that strains it most: tolerance of the losses, ranks, changes.
VARIANTS: dict[str, tuple[float, int, dict[str, Any], dict[str, Any]]] = {
    "tied pp2": (1e-6, 2, {"model": {"tied_embeddings": True}}, {"parallel": {"pipeline": 2}}),
    "tied tp2 pp2": (
        1e-6,
        4,
        {"model": {"tied_embeddings": True}},
        {"parallel": {"tensor": 2, "pipeline": 2, "sequence": True}},
    ),
    "neox-like tp2 sp": (
        1e-6,
        2,
        {"model": {"activation": "gelu", "bias": True, "rope": {"share": 0.25}, "kv_heads": 4}},
        {"parallel": {"tensor": 2, "sequence": True}},
    ),
    "qwen-like tp2 sp": (
        1e-6,
        2,
        {"model": {"qkv_bias": True, "qk_norm": True}},
        {"parallel": {"tensor": 2, "sequence": True}},
    ),
    "long context cp2": (
        1e-6,
        2,
        {"model": {"rope": {"scaling": {"kind": "llama3", "original_length": 16, "factor": 4}}}},
        {"parallel": {"context": 2}},
    ),
    "bfloat16 dp2 distopt": (
        2e-3,
        2,
        {"precision": "bfloat16"},
        {"parallel": {"distributed_optimizer": True}},
    ),
    "bfloat16 tp2 sp": (2e-3, 2, {"precision": "bfloat16"}, {"parallel": {"tensor": 2, "sequence": True}}),
}


@pytest.fixture(scope="module")
def trunk(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint after 3 steps of one process, and that process's next 5 steps."""
    folder = tmp_path_factory.mktemp("trunk") / "checkpoint"
    pools(1).run(CASES, changes={}, steps=3, save=str(folder))
    (reference,) = pools(1).run(CASES, changes={}, first=3, load=str(folder))
    return {"folder": folder, "reference": reference}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_agrees_with_one_process(pools: Pools, trunk: dict[str, Any], name: str) -> None:
    ranks, changes = LAYOUTS[name]
    for result in pools(ranks).run(CASES, changes=changes, first=3, load=str(trunk["folder"])):
        assert result["losses"] == pytest.approx(trunk["reference"]["losses"], rel=1e-6)
        assert result["norms"] == pytest.approx(trunk["reference"]["norms"], rel=1e-5)
        assert result["evaluation"] == pytest.approx(trunk["reference"]["evaluation"], rel=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_seed_gives_the_same_model(pools: Pools, name: str) -> None:
    ranks, changes = LAYOUTS[name]
    (reference,) = pools(1).run(CASES, changes={}, steps=2)
    for result in pools(ranks).run(CASES, changes=changes, steps=2):
        assert result["losses"] == pytest.approx(reference["losses"], rel=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_writes_what_one_process_reads(pools: Pools, trunk: dict[str, Any], name: str, tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[name]
    saved = tmp_path / "checkpoint"
    first = pools(ranks).run(CASES, changes=changes, first=3, steps=2, load=str(trunk["folder"]), save=str(saved))
    (rest,) = pools(1).run(CASES, changes={}, first=5, steps=3, load=str(saved))
    losses = first[0]["losses"] + rest["losses"]
    assert losses == pytest.approx(trunk["reference"]["losses"], rel=1e-6)


def test_padding_is_not_counted(pools: Pools) -> None:
    (reference,) = pools(1).run(CASES, changes={}, steps=2, padded=True)
    for ranks, changes in ((2, {}), (2, {"parallel": {"context": 2}}), (2, {"parallel": {"pipeline": 2}})):
        for result in pools(ranks).run(CASES, changes=changes, steps=2, padded=True):
            assert result["losses"] == pytest.approx(reference["losses"], rel=1e-6)
            assert result["norms"] == pytest.approx(reference["norms"], rel=1e-5)
            assert result["evaluation"] == pytest.approx(reference["evaluation"], rel=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_other_models_agree_too(pools: Pools, name: str) -> None:
    tolerance, ranks, model, layout = VARIANTS[name]
    (reference,) = pools(1).run(CASES, changes=model, steps=3)
    for result in pools(ranks).run(CASES, changes={**model, **layout}, steps=3):
        assert result["losses"] == pytest.approx(reference["losses"], rel=tolerance)
        assert result["norms"] == pytest.approx(reference["norms"], rel=10 * tolerance)
