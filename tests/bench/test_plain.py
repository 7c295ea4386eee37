"""The engine computes what a plain PyTorch model does: an independent check of model, loss, clipping and optimizer."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pool import Pools

MODELS: dict[str, dict[str, Any]] = {
    "swiglu, grouped queries": {},
    "multi-head": {"kv_heads": 4},
    "geglu": {"activation": "geglu"},
    "gelu, biases": {"activation": "gelu", "bias": True},
    "swiglu, biases": {"bias": True},
    "qkv biases": {"qkv_bias": True},
    "qk norm": {"qk_norm": True},
    "tied embeddings": {"tied_embeddings": True},
    "wide heads": {"head_dim": 32},
    "partial rotary": {"rope": {"share": 0.5}},
    "linear scaling": {"rope": {"scaling": {"kind": "linear", "factor": 4.0}}},
    "llama3 scaling": {"rope": {"scaling": {"kind": "llama3", "original_length": 16}}},
}


def assert_agree(found: dict[str, Any], loss: float, norm: float) -> None:
    ours, theirs = (list(zip(*found[name], strict=True)) for name in ("engine", "plain"))
    assert ours[0] == pytest.approx(theirs[0], rel=loss)
    assert ours[1] == pytest.approx(theirs[1], rel=norm)
    assert ours[2] == theirs[2]
    assert ours[0][-1] < ours[0][0]  # they do learn


@pytest.mark.parametrize("name", MODELS)
def test_losses_over_five_steps(pools: Pools, name: str) -> None:
    # Clipping is on: the norms of these steps are above 0.5.
    (found,) = pools(1).run("tests.bench.cases:side_by_side", changes={"model": MODELS[name]})
    assert_agree(found, loss=1e-5, norm=1e-3)


def test_losses_with_padding(pools: Pools) -> None:
    (found,) = pools(1).run("tests.bench.cases:side_by_side", changes={}, padded=True)
    assert_agree(found, loss=1e-5, norm=1e-3)
    assert 0 < found["engine"][0][2] < 8 * 32


def test_losses_without_clipping(pools: Pools) -> None:
    changes = {"optim": {"peak_lr": 1e-2, "clip": None}}
    (found,) = pools(1).run("tests.bench.cases:side_by_side", changes=changes)
    assert_agree(found, loss=1e-5, norm=1e-3)


def test_losses_in_bfloat16(pools: Pools) -> None:
    (found,) = pools(1).run("tests.bench.cases:side_by_side", changes={"precision": "bfloat16"})
    assert_agree(found, loss=5e-3, norm=0.1)
