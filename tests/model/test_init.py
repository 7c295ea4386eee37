"""New weights: the right spread, decided by the seed and the name of a tensor, never by the layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pool import Pools

FRESH = "tests.model.cases:fresh"
MODEL = {"layers": 4, "hidden": 128, "ffn": 192, "heads": 4, "kv_heads": 2, "bias": True, "qk_norm": True}


@pytest.fixture(scope="module")
def weights(pools: Pools) -> dict[str, np.ndarray]:
    """The weights of a new model in one process."""
    (found,) = pools(1).run(FRESH, model=MODEL)
    assert isinstance(found, dict)
    return found


def test_the_spread(weights: dict[str, np.ndarray]) -> None:
    matrices = {name: value for name, value in weights.items() if value.ndim > 1}
    assert len(matrices) == 2 + 4 * 5  # of each layer: qkv, out, gate, up, down
    for name, value in matrices.items():
        residual = "linear_proj" in name or "linear_fc2" in name
        std = 0.02 / math.sqrt(2 * 4) if residual else 0.02
        assert value.std() == pytest.approx(std, rel=0.02), name
        assert abs(value.mean()) < 4 * std / math.sqrt(value.size), name
        assert ((value / value.std()) ** 4).mean() == pytest.approx(3, abs=0.3), name  # as of a normal distribution


def test_norms_are_one_and_biases_zero(weights: dict[str, np.ndarray]) -> None:
    vectors = {name: value for name, value in weights.items() if value.ndim == 1}
    for name, value in vectors.items():
        assert np.all(value == (1.0 if "norm" in name else 0.0)), name
    assert sum("norm" in name for name in vectors) == 1 + 4 * 4
    assert sum("bias" in name for name in vectors) == 4 * 5


def test_all_that_is_not_drawn_begins_at_one_or_zero(pools: Pools) -> None:
    latent = {"kv_rank": 20, "q_rank": 12, "plain_dim": 8, "rope_dim": 4, "value_dim": 6}
    model = {"latent": latent, "heads": 2, "kv_heads": 2, "norm": "layernorm", "norm_place": "output", "sub_norm": True}
    (found,) = pools(1).run(FRESH, model=model)
    for name, value in found.items():
        if "norm" in name or "bias" in name:
            assert np.all(value == (0.0 if "bias" in name else 1.0)), name
        else:
            assert 0.005 < value.std() < 0.03, name


def test_no_two_tensors_are_the_same(weights: dict[str, np.ndarray]) -> None:
    starts = [tuple(value.reshape(-1)[:8]) for value in weights.values() if value.ndim > 1]
    assert len(set(starts)) == len(starts)


def test_the_seed_decides(pools: Pools, weights: dict[str, np.ndarray]) -> None:
    (again,) = pools(1).run(FRESH, model=MODEL)
    assert all(np.array_equal(again[name], value) for name, value in weights.items())
    (other,) = pools(1).run(FRESH, model=MODEL, seed=6)
    assert not any(np.array_equal(other[name], value) for name, value in weights.items() if value.ndim > 1)


@pytest.mark.parametrize("std", [0.005, 0.1])
def test_the_spread_is_configured(pools: Pools, std: float) -> None:
    (found,) = pools(1).run(FRESH, model={**MODEL, "init_std": std})
    (embedding,) = (value for name, value in found.items() if "word_embeddings" in name)
    assert embedding.std() == pytest.approx(std, rel=0.02)


LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"distributed_optimizer": True},
]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_the_layout_does_not(pools: Pools, tmp_path: Path, parallel: dict[str, Any], tied: bool) -> None:
    model = {**MODEL, "tied_embeddings": tied}
    pools(2).run(FRESH, save=str(tmp_path / "saved"), model=model, parallel=parallel)
    (alone,) = pools(1).run(FRESH, model=model)
    (loaded,) = pools(1).run(FRESH, load=str(tmp_path / "saved"), model=model, seed=6)
    assert loaded.keys() == alone.keys()
    for name, value in alone.items():
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)
