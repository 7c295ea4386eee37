"""The whole network against a plain one in float64, for every choice of its configuration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.pool import Pools

CASES = "tests.model.cases"
MODELS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "a head each": {"kv_heads": 2},
    "wide heads": {"head_dim": 24},
    "half rotated": {"rope": {"share": 0.5}},
    "another base": {"rope": {"base": 500.0}},
    "stretched": {"rope": {"scaling": {"kind": "llama3", "factor": 4, "original_length": 16}}},
    "interpolated": {"rope": {"scaling": {"kind": "linear", "factor": 3}}},
    "yarn": {"rope": {"scaling": {"kind": "yarn", "factor": 4, "original_length": 16}}},
    "normed heads": {"qk_norm": True},
    "tied": {"tied_embeddings": True},
    "all biases": {"bias": True},
    "qkv biases": {"qkv_bias": True},
    "gelu": {"activation": "gelu"},
    "geglu": {"activation": "geglu"},
    "large eps": {"norm_eps": 0.1},
    "everything": {
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "rope": {"share": 0.5, "scaling": {"kind": "llama3", "original_length": 16}},
        "qk_norm": True,
        "tied_embeddings": True,
        "bias": True,
        "activation": "geglu",
    },
}


@pytest.fixture(scope="module")
def found(pools: Pools) -> dict[str, Any]:
    """For each model, what Megatron's and the plain one compute."""
    return {name: pools(1).run(f"{CASES}:beside_plain", model=model)[0] for name, model in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_plain_model(found: dict[str, Any], name: str) -> None:
    logits, expected = found[name]["logits"]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    loss, norm, parameters = (found[name][key] for key in ("loss", "norm", "parameters"))
    assert loss[0] == pytest.approx(loss[1], rel=1e-6)
    assert norm[0] == pytest.approx(norm[1], rel=1e-5)
    assert parameters[0] == parameters[1]


def test_every_choice_does_something(found: dict[str, Any]) -> None:
    losses = {name: round(result["loss"][0], 6) for name, result in found.items()}
    assert len(set(losses.values())) == len(MODELS), losses


def test_bfloat16_is_close_to_float32(pools: Pools) -> None:
    (exact,) = pools(1).run(f"{CASES}:in_precision", precision="float32", steps=4)
    (rounded,) = pools(1).run(f"{CASES}:in_precision", precision="bfloat16", steps=4)
    assert rounded != exact
    for (loss, norm), (expected_loss, expected_norm) in zip(rounded, exact, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-2)
        assert norm == pytest.approx(expected_norm, rel=5e-2)
