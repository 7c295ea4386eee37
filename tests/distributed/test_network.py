"""What public families ask of the network gives the same numbers in every layout, and its checkpoints fit them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pools

CASES = "tests.distributed.cases:train"
LATENT = {"kv_rank": 20, "q_rank": 12, "plain_dim": 8, "rope_dim": 4, "value_dim": 6}
YARN = {"kind": "yarn", "factor": 4, "original_length": 24, "mscale": 0.7, "mscale_all_dim": 1.3}
MODELS: dict[str, dict[str, Any]] = {
    "neox": {
        "activation": "gelu",
        "bias": True,
        "norm": "layernorm",
        "parallel_residual": True,
        "rope": {"share": 0.25},
        "kv_heads": 4,
    },
    "olmo 2": {"qk_norm": "all_heads", "norm_place": "output", "bias": True},
    "bitnet": {"activation": "relu2glu", "sub_norm": True},
    "mistral": {"window": 5, "rope": {"scaling": YARN}, "qk_norm": True},
    "latent": {"latent": LATENT, "kv_heads": None, "rope": {"scaling": YARN}, "sub_norm": True},
    "latent and experts": {
        "latent": {**LATENT, "q_rank": None},
        "kv_heads": None,
        "parallel_residual": True,
        "moe": {
            "experts": 4,
            "top_k": 2,
            "ffn": 32,
            "shared_ffn": 32,
            "first_dense": 1,
            "score": "sigmoid",
            "renormalise": True,
            "scale": 2.5,
            "balance": {"kind": "bias"},
        },
    },
    "experts, output norms": {
        "moe": {"experts": 4, "top_k": 1},
        "norm": "layernorm",
        "norm_place": "output",
        "qk_norm": "all_heads",
    },
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel": {"tensor": 2}}),
    "tp2 sp": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "pp2": (2, {"parallel": {"pipeline": 2}}),
    "cp2": (2, {"parallel": {"context": 2}}),
    "ep2": (2, {"parallel": {"expert": 2}}),
    "tp2 sp dp2 distopt": (4, {"parallel": {"tensor": 2, "sequence": True, "distributed_optimizer": True}}),
    "recompute full": (1, {"recompute": "full"}),
    "recompute selective": (1, {"recompute": "selective"}),
}
# Experts need sequence parallelism under tensor parallelism.
CHOICES = [
    (model, layout)
    for model, keys in MODELS.items()
    for layout in LAYOUTS
    if layout != ("tp2" if "moe" in keys else "ep2")
]


def _changes(model: str) -> dict[str, Any]:
    """Weights large enough that attention counts, and updates that do not blow up the rounding of small gradients."""
    optim = {"peak_lr": 3e-3, "clip": 0.5, "eps": 1e-2}
    return {"model": {"init_std": 0.1, **MODELS[model]}, "optim": optim}


@pytest.fixture(scope="module")
def references(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of each model a checkpoint after 2 steps of one process, and its next 2 steps."""
    found = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp("network") / "checkpoint"
        pools(1).run(CASES, changes=_changes(name), steps=2, save=str(folder))
        (rest,) = pools(1).run(CASES, changes=_changes(name), first=2, steps=2, load=str(folder))
        found[name] = {"folder": folder, **rest}
    return found


@pytest.mark.parametrize(("model", "layout"), CHOICES)
def test_layouts_agree_and_read_each_other(
    pools: Pools, references: dict[str, dict[str, Any]], model: str, layout: str, tmp_path: Path
) -> None:
    reference, (ranks, changes) = references[model], LAYOUTS[layout]
    saved, start = str(tmp_path / "checkpoint"), str(reference["folder"])
    arguments: dict[str, Any] = {
        "changes": {**_changes(model), **changes},
        "first": 2,
        "steps": 1,
        "load": start,
        "save": saved,
    }
    results = pools(ranks).run(CASES, **arguments)
    for result in results:
        assert result["losses"] == pytest.approx(reference["losses"][:1], rel=1e-6)
        assert result["norms"] == pytest.approx(reference["norms"][:1], rel=1e-6)
    (rest,) = pools(1).run(CASES, changes=_changes(model), first=3, steps=1, load=saved)
    assert rest["losses"] == pytest.approx(reference["losses"][1:], rel=1e-6)
    assert rest["norms"] == pytest.approx(reference["norms"][1:], rel=1e-6)
    assert rest["evaluation"] == pytest.approx(reference["evaluation"], rel=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_same_seed_gives_the_same_model(pools: Pools, model: str) -> None:
    alone, *ranks = (
        pools(n).run(CASES, changes={**_changes(model), **changes}, steps=1)[0]
        for n, changes in ((1, {}), LAYOUTS["tp2 sp"], LAYOUTS["pp2"])
    )
    for found in ranks:
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16(pools: Pools, model: str) -> None:
    (exact,) = pools(1).run(CASES, changes=_changes(model), steps=2)
    changes = {**_changes(model), "precision": "bfloat16"}
    for ranks, layout in ((1, {}), LAYOUTS["tp2 sp"]):
        for result in pools(ranks).run(CASES, changes={**changes, **layout}, steps=2):
            assert result["losses"] == pytest.approx(exact["losses"], rel=5e-3)
            assert result["norms"] == pytest.approx(exact["norms"], rel=5e-2)
