from __future__ import annotations

from typing import Any

import pytest

from megacpt.config import check_layout, load_model, run_from_mapping
from megacpt.config.explain import explain
from megacpt.config.fixed import model_problems
from megacpt.errors import ConfigError, LayoutError
from tests.config.helpers import plain_run

SIZES: dict[str, Any] = {"layers": 4, "hidden": 64, "ffn": 96, "heads": 4}
GROUP = {"scope": "group", "group": 32}


def _model(quantise: dict[str, Any], **sizes: Any) -> Any:
    return load_model({**SIZES, **sizes, "quantise": quantise})


def test_a_grid_is_enough() -> None:
    quantise = _model({"grid": "ternary"}).quantise
    assert quantise.parts == ["attention", "mlp", "experts"]
    assert (quantise.scale.scope, quantise.scale.rule, quantise.scale.format) == ("tensor", "add", "float32")
    assert (quantise.activations, quantise.bits) == ("none", None)
    assert load_model(SIZES).quantise is None


@pytest.mark.parametrize(
    ("quantise", "message"),
    [
        ({"grid": "ternery"}, "did you mean 'ternary'?"),
        ({"grid": "ternary", "bits": 2}, "model.quantise.bits: 2: the grid ternary has its own number of levels"),
        ({"grid": "int"}, "model.quantise.bits: missing: the grid int takes 2 to 8"),
        ({"grid": "int", "bits": 1}, "model.quantise.bits: 1: the grid int takes 2 to 8"),
        ({"grid": "quest", "bits": 8, "scale": GROUP}, "model.quantise.bits: 8: the grid quest takes 1 to 7"),
        ({"grid": "quest", "bits": 4}, "model.quantise.scale.group: quest transforms groups of weights"),
        (
            {"grid": "quest", "bits": 4, "scale": {"scope": "group", "group": 24}},
            "model.quantise.scale.group: quest transforms groups of weights",
        ),
        (
            {"grid": "binary", "scale": {"rule": "clamp"}},
            "model.quantise.scale.rule: clamp is a rule of the grid ternary, not of binary: take add",
        ),
        (
            {"grid": "ternary", "scale": {"scope": "shard"}},
            "model.quantise.scale.shards: missing: the scope shard needs a number, such as `shards: 2`",
        ),
        (
            {"grid": "ternary", "scale": {"scope": "shard", "shards": 2, "group": 8}},
            "model.quantise.scale.group: 8 is for the scope group, and the scope is shard: remove the key",
        ),
        ({"grid": "ternary", "parts": []}, "model.quantise.parts: a section or list: this must hold at least one"),
        ({"grid": "ternary", "parts": ["mlp", "mlp"]}, "model.quantise.parts: mlp, mlp: name each part once"),
        ({"grid": "ternary", "parts": ["experts"]}, "model.quantise.parts: experts: the model has none"),
        (
            {"grid": "ternary", "parts": ["mpl"]},
            "model.quantise.parts.0: mpl: this must be one of attention, mlp, experts; did you mean 'mlp'?",
        ),
        (
            {"grid": "ternary", "scale": {"scope": "shard", "shards": 3}},
            "model.quantise.scale.shards: 3 does not divide model.kv_heads, which is 4",
        ),
        (
            {"grid": "ternary", "scale": {"scope": "group", "group": 64}},
            "model.quantise.scale.group: 64 does not divide model.ffn, which is 96",
        ),
    ],
)
def test_wrong_keys(quantise: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _model(quantise)
    assert message in str(caught.value)


def test_only_the_matrices_that_are_quantised_have_to_fit() -> None:
    scale = {"scope": "shard", "shards": 3}
    assert _model({"grid": "ternary", "scale": scale, "parts": ["mlp"]}).quantise.scale.shards == 3
    assert _model({"grid": "ternary", "scale": {"scope": "group", "group": 64}, "parts": ["attention"]})
    with pytest.raises(ConfigError, match=r"shards: 3 does not divide model\.moe\.ffn, which is 40"):
        _model({"grid": "ternary", "scale": scale, "parts": ["experts"]}, moe={"experts": 4, "ffn": 40})


@pytest.mark.parametrize(
    ("scale", "tensor", "message"),
    [
        ({"scope": "shard", "shards": 2}, 1, None),
        ({"scope": "shard", "shards": 2}, 2, None),
        ({"scope": "shard", "shards": 2}, 4, None),
        ({"scope": "shard", "shards": 4}, 2, None),
        (
            {"scope": "shard", "shards": 2},
            3,
            "parallel.tensor: 3 neither divides model.quantise.scale.shards (2) nor is a multiple of it: take 2 or 4",
        ),
        (GROUP, 3, None),
        ({"scope": "group", "group": 48}, 1, None),
        (
            {"scope": "group", "group": 48},
            4,
            "model.quantise.scale.group: 48 does not divide the 24 columns that each of 4 tensor-parallel ranks has of "
            "model.ffn: take a smaller group, or another parallel.tensor",
        ),
    ],
)
def test_layouts(scale: dict[str, Any], tensor: int, message: str | None) -> None:
    sizes = {"layers": 2, "hidden": 96, "ffn": 96, "heads": 12, "head_dim": 8}
    model = {**sizes, "quantise": {"grid": "ternary", "scale": scale}}
    run = run_from_mapping({**plain_run(), "model": model, "parallel": {"tensor": tensor}})
    if message is None:
        check_layout(run, tensor)
        return
    with pytest.raises(LayoutError) as caught:
        check_layout(run, tensor)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("quantise", "cache", "message"),
    [
        ({"grid": "ternary"}, "2bit", None),
        ({"grid": "int", "bits": 4}, "fp8", None),
        (
            {"grid": "int", "bits": 4},
            "2bit",
            "quantised_cache: 2bit holds -1, 0 and 1, and the grid int has codes up to 7",
        ),
        (
            {"grid": "int", "bits": 8},
            "fp8",
            "quantised_cache: fp8 holds codes up to 16 exactly, and here they reach 127",
        ),
    ],
)
def test_caches(quantise: dict[str, Any], cache: str, message: str | None) -> None:
    mapping = {**plain_run(), "model": {**SIZES, "quantise": quantise}, "quantised_cache": cache}
    if message is None:
        assert run_from_mapping(mapping).quantised_cache == cache
        return
    with pytest.raises(ConfigError) as caught:
        run_from_mapping(mapping)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("quantise", "distributed", "message"),
    [
        ({"grid": "ternary"}, True, None),
        ({"grid": "ternary", "scale": {"scope": "group", "group": 8}}, True, None),
        ({"grid": "ternary"}, False, "parallel.gather: 2bit: only a distributed optimizer gathers weights: take full"),
        (None, True, "parallel.gather: 2bit is for ternary matrices, and model.quantise is not given: take full"),
        ({"grid": "binary"}, True, "2bit is for the grid ternary, and model.quantise.grid is binary: take full"),
        (
            {"grid": "ternary", "scale": {"scope": "group", "group": 4}},
            True,
            "which with a model.quantise.scale.group of 4 is more than the weights: take full, or groups of at least 5",
        ),
    ],
)
def test_what_may_be_gathered(quantise: dict[str, Any] | None, distributed: bool, message: str | None) -> None:
    parallel = {"distributed_optimizer": distributed, "gather": "2bit"}
    mapping = {**plain_run(), "model": {**SIZES, "quantise": quantise}, "parallel": parallel}
    if message is None:
        assert run_from_mapping(mapping).parallel.gather == "2bit"
        return
    with pytest.raises(ConfigError) as caught:
        run_from_mapping(mapping)
    assert message in str(caught.value)


def test_a_stage_may_quantise_what_was_float() -> None:
    ternary = _model({"grid": "ternary"})
    assert list(model_problems(load_model(SIZES), ternary)) == []
    assert list(model_problems(ternary, load_model(SIZES))) == []


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (None, {"grid": "ternary"}, "model.quantise: changes beside stage.carry.upcycle"),
        (
            {"grid": "ternary", "parts": ["mlp"]},
            {"grid": "ternary", "parts": ["mlp"]},
            "model.quantise.parts: mlp: with stage.carry.upcycle: copy experts are copies of the MLP: name both",
        ),
        ({"grid": "ternary"}, {"grid": "ternary"}, None),
    ],
)
def test_experts_are_made_of_mlps_that_are_quantised_as_they_are(
    before: dict[str, Any] | None, after: dict[str, Any], message: str | None
) -> None:
    moe = {"experts": 4, "top_k": 2, "renormalise": True}
    found = model_problems(load_model({**SIZES, "quantise": before}), _model(after, moe=moe), "copy")
    assert [str(problem).startswith(message or "") for problem in found] == [True] * (message is not None)


def test_every_key_is_explained() -> None:
    text = explain("model.quantise")
    assert all(key in text for key in ("grid", "bits", "scale", "parts", "activations"))
    assert "ternary" in explain("model.quantise.grid")
    assert "`parallel.tensor` must divide it" in explain("model.quantise.scale.shards").replace("\n  ", " ")
    assert "2bit" in explain("quantised_cache")
