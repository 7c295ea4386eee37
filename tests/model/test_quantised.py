"""Quantised layers: their definition and gradient in float64, when they are quantised, and what is kept."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pool import Pools

CASES = "tests.model.quantised_cases"
GROUP = {"scope": "group", "group": 4}
QUANTISE: dict[str, dict[str, Any]] = {
    "ternary": {"grid": "ternary"},
    "ternary, 2 shards": {"grid": "ternary", "scale": {"scope": "shard", "shards": 2}},
    "ternary, 4 shards": {"grid": "ternary", "scale": {"scope": "shard", "shards": 4, "format": "float16"}},
    "ternary, groups": {"grid": "ternary", "scale": GROUP},
    "ternary, int8": {"grid": "ternary", "scale": {"rule": "clamp"}, "activations": "int8"},
    "ternary, fp8": {"grid": "ternary", "activations": "fp8"},
    "binary": {"grid": "binary"},
    "int": {"grid": "int", "bits": 4, "scale": {"scope": "shard", "shards": 2}},
    "quest": {"grid": "quest", "bits": 1, "scale": GROUP},
}


@pytest.mark.parametrize("name", QUANTISE)
def test_layers_are_their_definition_in_any_layout(pools: Pools, name: str) -> None:
    caches = ["dense", "fp8"] + (["2bit"] if "ary" in name else [])
    for tensor, sequence in ((1, False), (2, False), (2, True)):
        for cache in caches:
            arguments: dict[str, Any] = {
                "quantise": QUANTISE[name],
                "tensor": tensor,
                "sequence": sequence,
                "cache": cache,
            }
            for result in pools(tensor).run(f"{CASES}:layers", **arguments):
                for what, difference in result.items():
                    assert difference < 1e-12, (what, arguments)


@pytest.mark.parametrize("name", QUANTISE)
def test_experts_are_their_definition(pools: Pools, name: str) -> None:
    (result,) = pools(1).run(f"{CASES}:experts", quantise=QUANTISE[name])
    assert max(result.values()) < 1e-12


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recompute": "full", "batch": {"microbatch": 1}},
        {"quantised_cache": "2bit"},
        {"precision": "bfloat16", "parallel": {"distributed_optimizer": True}},
        {"parallel": {"distributed_optimizer": True, "gather": "2bit"}},
        {"model": {"moe": {"experts": 4}}},
    ],
)
def test_weights_are_quantised_once_an_update(pools: Pools, changes: dict[str, Any]) -> None:
    model = {"layers": 2, "quantise": {"grid": "ternary"}, **changes.get("model", {})}
    (seen,) = pools(1).run(f"{CASES}:rebuilds", changes={**changes, "model": model})
    # built, evaluated, stepped, evaluated, stepped, stepped without an update, loaded, evaluated, changed, evaluated
    assert seen == [{0}, {1}, {2}, {2}, {3}, {3}, {3}, {4}, {4}, {5}]


@pytest.mark.parametrize("grid", ["ternary", "binary", "int"])
def test_what_a_step_reports_is_what_happened(pools: Pools, grid: str) -> None:
    quantise = {"grid": grid, "bits": 4 if grid == "int" else None}
    (result,) = pools(1).run(f"{CASES}:statistics", changes={"model": {"quantise": quantise, "layers": 2}})
    reported = result["reported"]
    assert result["matrices"] == 0
    assert reported["quantise/zeros"] == result["zeros"]
    assert reported["quantise/flips"] == result["flips"] > 0
    assert (result["zeros"] > 0) == (grid != "binary")
    layers = [reported[f"quantise/layer-{n}/flips"] for n in (1, 2)]
    assert sum(layers) / 2 == pytest.approx(result["flips"])


@pytest.mark.parametrize(("cache", "between", "made"), [("dense", 1, 1), ("fp8", 0, 2), ("2bit", 0, 2)])
def test_a_small_form_is_all_that_is_kept(pools: Pools, cache: str, between: int, made: int) -> None:
    (result,) = pools(1).run(f"{CASES}:memory", cache=cache)
    assert result == {"between": between, "made": made, "rebuilt": 1}


def test_parts_that_are_not_named_stay_as_they_are(pools: Pools) -> None:
    float_model = {"layers": 2}
    named = {"attention": 2, "mlp": 2}
    sizes = {}
    for part, count in named.items():
        model = {**float_model, "quantise": {"grid": "ternary", "parts": [part]}}
        (result,) = pools(1).run(f"{CASES}:scales", changes={"model": model})
        assert len(result["scales"]) == count * 2
        sizes[part] = result["evaluation"]
    assert sizes["attention"] != sizes["mlp"]


def test_shards_keep_the_function_over_layouts(pools: Pools, tmp_path: Any) -> None:
    """Scales of two shards, trained on two ranks, are those of the model on one, and again on two."""
    model = {"model": {"quantise": {"grid": "ternary", "scale": {"scope": "shard", "shards": 2}}}}
    split = {**model, "parallel": {"tensor": 2, "sequence": True}}
    first = pools(2).run(f"{CASES}:scales", changes=split, steps=2, save=str(tmp_path / "a"))
    (alone,) = pools(1).run(f"{CASES}:scales", changes=model, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    again = pools(2).run(f"{CASES}:scales", changes=split, load=str(tmp_path / "b"))
    assert [result["scales"] for result in again] == [result["scales"] for result in first]
    assert again[0]["evaluation"] == first[0]["evaluation"]
    joined = [left + right for left, right in zip(*(result["scales"] for result in first), strict=True)]
    assert alone["scales"] == joined
    assert alone["evaluation"] == pytest.approx(first[0]["evaluation"], rel=1e-7)
    for scales, sizes in zip(alone["scales"], alone["sizes"], strict=True):
        assert sizes == [0, *sorted(set(scales))]  # as in Spectra: 0 and a size for each shard
