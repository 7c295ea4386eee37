"""Factors on rate and weight decay by part of the model: which parameters, and the same under every layout."""

from __future__ import annotations

from typing import Any

import pytest

from megacpt.config import run_from_mapping
from megacpt.config.multipliers import Multipliers
from megacpt.errors import ConfigError
from megacpt.optim.groups import multipliers_of
from tests.config.helpers import plain_run
from tests.pool import Pools

PARTS = {
    "embeddings": {"lr": 0.5, "weight_decay": 0},
    "output": {"lr": 0.25, "weight_decay": 2},
    "norms": {"lr": 0.1},
    "attention": {"lr": 2, "weight_decay": 0.5},
    "mlp": {"lr": 3},
    "lower_layers": {"layers": 2, "lr": 0.5, "weight_decay": 0.25},
}
BLOCK = "decoder.layers.0"


@pytest.mark.parametrize(
    ("name", "layer", "dims", "factors"),
    [
        ("embedding.word_embeddings.weight", None, 2, (0.5, 0)),
        ("output_layer.weight", None, 2, (0.25, 2)),
        ("decoder.final_layernorm.weight", None, 1, (0.1, 0)),
        (f"{BLOCK}.input_layernorm.weight", 2, 1, (0.05, 0)),
        (f"{BLOCK}.input_layernorm.bias", 2, 1, (0.05, 0)),
        (f"{BLOCK}.post_mlp_layernorm.weight", 3, 1, (0.1, 0)),
        (f"{BLOCK}.self_attention.linear_proj.sub_norm.weight", 3, 1, (0.1, 0)),
        (f"{BLOCK}.self_attention.linear_kv_down_proj.weight", 3, 2, (2, 0.5)),
        (f"{BLOCK}.self_attention.q_layernorm.weight", 3, 1, (0.1, 0)),
        (f"{BLOCK}.self_attention.linear_qkv.weight", 2, 2, (1, 0.125)),
        (f"{BLOCK}.self_attention.linear_qkv.weight", 3, 2, (2, 0.5)),
        (f"{BLOCK}.mlp.linear_fc1.weight", 1, 2, (1.5, 0.25)),
        (f"{BLOCK}.mlp.linear_fc1.weight", 3, 2, (3, 1)),
        (f"{BLOCK}.mlp.linear_fc1.bias", 3, 1, (3, 0)),
    ],
)
def test_factors_of_a_parameter(name: str, layer: int | None, dims: int, factors: tuple[float, float]) -> None:
    multipliers = Multipliers.model_validate(PARTS)
    assert multipliers_of(name, layer, dims, multipliers, tied=False) == factors


def test_a_tied_output_matrix_is_the_embedding() -> None:
    multipliers = Multipliers.model_validate(PARTS)
    assert multipliers_of("output_layer.weight", None, 2, multipliers, tied=True) == (0.5, 0)


def test_without_factors_only_matrices_decay() -> None:
    assert multipliers_of(f"{BLOCK}.mlp.linear_fc1.weight", 1, 2, Multipliers(), tied=False) == (1, 1)
    assert multipliers_of(f"{BLOCK}.mlp.linear_fc1.bias", 1, 1, Multipliers(), tied=False) == (1, 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.multipliers.embedings.lr=0.5", r"did you mean 'optim\.multipliers\.embeddings\.lr'"),
        ("optim.multipliers={embedings: {lr: 0.5}}", r"did you mean 'optim\.multipliers\.embeddings'"),
        ("optim.multipliers.mlp.lr=-1", "at least 0"),
        ("optim.multipliers.lower_layers.layers=5", "take at most 4"),
    ],
)
def test_impossible_factors_name_their_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_from_mapping(plain_run(), [override])


def test_a_tied_output_matrix_has_no_factors_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"set optim\.multipliers\.embeddings"):
        run_from_mapping(plain_run(), ["model.tied_embeddings=true", "optim.multipliers.output.lr=2"])


CASE = "tests.optim.cases:moved"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel": {"tensor": 2}}),
    "pp2": (2, {"parallel": {"pipeline": 2}}),
    "pp2 interleaved distopt": (
        2,
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": True}},
    ),
    "dp2 distopt": (2, {"parallel": {"distributed_optimizer": True}}),
    "tied pp2": (2, {"parallel": {"pipeline": 2}, "model": {"tied_embeddings": True}}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_weights(pools: Pools, name: str) -> None:
    ranks, changes = LAYOUTS[name]
    parts = {key: value for key, value in PARTS.items() if key != "output" or "model" not in changes}
    optim = {"peak_lr": 1e-2, "multipliers": parts}
    one = {key: value for key, value in changes.items() if key == "model"}
    (reference,) = pools(1).run(CASE, changes={**one, "optim": optim})
    (plain,) = pools(1).run(CASE, changes=one)
    assert reference["losses"][-1] != pytest.approx(plain["losses"][-1], rel=1e-3)
    for result in pools(ranks).run(CASE, changes={**changes, "optim": optim}):
        assert result["losses"] == pytest.approx(reference["losses"], rel=1e-6)


def test_a_factor_of_0_keeps_a_part_as_it_is(pools: Pools) -> None:
    optim = {"multipliers": {"attention": {"lr": 0}, "lower_layers": {"layers": 3, "lr": 0}}}
    (result,) = pools(1).run(CASE, changes={"optim": optim})
    assert {name for name in result["moved"] if "attention" in name} == set()
    assert {name for name in result["moved"] if ".mlp." in name} == {
        "decoder.layers.3.mlp.linear_fc1.weight",
        "decoder.layers.3.mlp.linear_fc2.weight",
    }


def test_the_first_step_is_as_long_as_rate_and_factor_say(pools: Pools) -> None:
    """Adam's first step moves each weight by the rate (Kingma and Ba 2015), here times its factor."""
    optim = {"weight_decay": 0.0, "multipliers": PARTS}
    (result,) = pools(1).run(CASE, changes={"optim": optim}, steps=1)
    assert result["moved"]["output_layer.weight"] == pytest.approx(1e-2 * 0.25, rel=1e-3)
    assert result["moved"]["decoder.layers.3.mlp.linear_fc1.weight"] == pytest.approx(1e-2 * 3, rel=1e-3)
    assert result["moved"]["decoder.layers.1.mlp.linear_fc1.weight"] == pytest.approx(1e-2 * 1.5, rel=1e-3)
