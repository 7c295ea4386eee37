"""Over a boundary in every layout: carried means, frozen parts, another optimizer; any layout loads any other's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pools

STAGE = "tests.optim.cases:stage"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "tp2 sp": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "pp2": (2, {"parallel": {"pipeline": 2}}),
    "dp2": (2, {}),
    "dp2 distopt": (2, {"parallel": {"distributed_optimizer": True}}),
    "tp2 dp2 distopt": (4, {"parallel": {"tensor": 2, "distributed_optimizer": True}}),
    "pp2 dp2 distopt interleaved": (
        4,
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": True}},
    ),
}
LION = {"optimizer": "lion", "peak_lr": 1e-4, "beta2": 0.99}
# Two stages behind a first one: their optimizers, and what becomes of the means at the two boundaries.
LINEAGES: dict[str, list[tuple[dict[str, Any], dict[str, tuple[float, float, float]]]]] = {
    "decayed": [
        ({}, {"exp_avg": (0.5, 0.9, 0.9), "exp_avg_sq": (0.25, 0.95, 0.95)}),
        ({"beta2": 0.99}, {"exp_avg": (1.0, 0.9, 0.9), "exp_avg_sq": (1.0, 0.95, 0.99)}),
    ],
    "lion and back": [
        (LION, {"exp_avg": (1.0, 0.9, 0.99)}),
        ({"peak_lr": 1e-3}, {"exp_avg": (1.0, 0.99, 0.9), "exp_avg_sq": (0.0, 0.95, 0.95)}),
    ],
    "frozen and not": [
        ({"freeze": ["embeddings", "norms", "layers:1-2"]}, {}),
        ({"freeze": ["attention"]}, {}),
    ],
}


def _checkpoint(folder: Path, step: int) -> str:
    return str(folder / "checkpoints" / f"step-{step:08d}")


@pytest.fixture(scope="module")
def trunk(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the checkpoint of a first stage."""
    folder = tmp_path_factory.mktemp("trunk")
    pools(1).run(STAGE, changes={}, save=_checkpoint(folder, 1))
    return folder


@pytest.fixture(scope="module")
def alone(pools: Pools, trunk: Path) -> dict[str, list[dict[str, Any]]]:
    """What one process finds in both stages of each lineage."""
    found = {}
    for name, stages in LINEAGES.items():
        folder = trunk / name
        found[name] = _stages(pools, [LAYOUTS["alone"]] * 2, stages, _checkpoint(trunk, 1), folder)
    return found


def _stages(
    pools: Pools, layouts: list[tuple[int, dict[str, Any]]], stages: list[Any], start: str, folder: Path
) -> list[dict[str, Any]]:
    """Train the two stages of a lineage, each in its layout; return the first rank's result of each."""
    found, load = [], start
    for number, ((ranks, layout), (optim, carry)) in enumerate(zip(layouts, stages, strict=True), 2):
        save = _checkpoint(folder, number)
        changes = {**layout, "optim": {"clip": 0.5, "peak_lr": 1e-2, **optim}}
        results = pools(ranks).run(STAGE, changes=changes, first=3 * number, load=load, save=save, carry=carry)
        found.append(results[0])
        load = save
    return found


@pytest.mark.parametrize("lineage", LINEAGES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "alone"])
def test_every_layout_gives_the_numbers_of_one_process(
    pools: Pools, trunk: Path, alone: dict[str, Any], tmp_path: Path, layout: str, lineage: str
) -> None:
    """The first stage behind the boundary in this layout, the second in the next one of the list."""
    names = list(LAYOUTS)
    other = names[(names.index(layout) + 1) % len(names)]
    ends = _stages(pools, [LAYOUTS[layout], LAYOUTS[other]], LINEAGES[lineage], _checkpoint(trunk, 1), tmp_path)
    for found, expected in zip(ends, alone[lineage], strict=True):
        # The sign of a mean near 0 depends on how a layout sums: Lion amplifies what is otherwise rounding.
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5 if "lion" in lineage else 1e-6)
        assert _moved(found, ("embedding", "norm")) == _moved(expected, ("embedding", "norm"))
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4 if "lion" in lineage else 1e-5)


def _moved(stage: dict[str, Any], parts: tuple[str, ...]) -> set[str]:
    """Which of these parts of the model were changed by a stage."""
    weights = {name: digest for name, digest in stage["before"].items() if "/" not in name}
    changed = {name for name, digest in weights.items() if stage["after"][name] != digest}
    return {part for part in parts if any(part in name for name in changed)}


def test_what_is_frozen_stays_to_the_last_bit(alone: dict[str, Any]) -> None:
    first, second = alone["frozen and not"]
    every = ("embedding", "output", "norm", "attention", "mlp", "layers.0.", "layers.1.", "layers.2.", "layers.3.")
    assert _moved(first, every) == {"output", "attention", "mlp", "layers.2.", "layers.3."}
    assert _moved(second, every) == set(every) - {"attention"}


def test_what_was_frozen_begins_with_a_new_state(alone: dict[str, Any]) -> None:
    first, second = (stage["counts"] for stage in alone["frozen and not"])
    assert "0.embedding.word_embeddings.weight/exp_avg" not in first  # not kept at all
    mlp, output = "0.decoder.layers.{}.mlp.linear_fc1.weight/exp_avg_sq", "0.output_layer.weight/exp_avg"
    assert [first[mlp.format(0)], first[mlp.format(3)], first[output]] == [0.0, 6.0, 6.0]
    assert [second[mlp.format(0)], second[mlp.format(3)], second[output]] == [3.0, 9.0, 9.0]
    assert second["0.embedding.word_embeddings.weight/exp_avg"] == 3.0


@pytest.mark.parametrize("layout", ["alone", "tp2 sp", "pp2", "dp2 distopt"])
def test_rounded_arithmetic_keeps_the_weights_behind(pools: Pools, trunk: Path, tmp_path: Path, layout: str) -> None:
    """A stage in bfloat16 hands on the float32 weights of what it did not train, and not their rounded copies."""
    ranks, changes = LAYOUTS[layout]
    frozen = {"optim": {"freeze": ["embeddings", "mlp"]}}
    (before,) = pools(1).run(STAGE, changes={}, steps=0, load=_checkpoint(trunk, 1))
    bfloat16 = {**changes, **frozen, "precision": "bfloat16"}
    pools(ranks).run(STAGE, changes=bfloat16, load=_checkpoint(trunk, 1), save=_checkpoint(tmp_path, 2))
    (after,) = pools(1).run(STAGE, changes=frozen, steps=0, load=_checkpoint(tmp_path, 2))
    weights = [name for name in before["after"] if "/" not in name]
    same = {name for name in weights if before["after"][name] == after["after"][name]}
    assert same == {name for name in weights if "embedding" in name or ".mlp." in name}


@pytest.mark.parametrize("frozen", [["embeddings"], ["embeddings", "layers:1-2"], ["output", "mlp"]])
def test_recomputed_layers_behind_frozen_ones_are_trained(pools: Pools, trunk: Path, frozen: list[str]) -> None:
    stages = [
        pools(1).run(STAGE, changes={"recompute": how, "optim": {"freeze": frozen}}, load=_checkpoint(trunk, 1))[0]
        for how in ("none", "full")
    ]
    assert stages[0]["losses"] == pytest.approx(stages[1]["losses"], rel=1e-6)
    assert stages[0]["losses"][2] != pytest.approx(stages[0]["losses"][0], rel=1e-3)


def test_a_frozen_tied_embedding(pools: Pools, tmp_path: Path) -> None:
    """Its copy on the last stage of a pipeline is frozen too."""
    tied = {"model": {"tied_embeddings": True}, "optim": {"freeze": ["embeddings", "layers:1-2"]}}
    (expected,) = pools(1).run(STAGE, changes=tied, save=_checkpoint(tmp_path, 1))
    for distributed in (False, True):
        parallel = {"pipeline": 2, "distributed_optimizer": distributed}
        for result in pools(2).run(STAGE, changes={**tied, "parallel": parallel}):
            assert result["losses"] == pytest.approx(expected["losses"], rel=1e-6)
            assert _moved(result, ("embedding", "output")) == set()


def test_ages_are_those_that_the_factors_give(alone: dict[str, Any]) -> None:
    import math

    first, second = (stage["counts"] for stage in alone["decayed"])
    name = "0.decoder.layers.0.mlp.linear_fc1.weight"
    age = math.log(1 - 0.5 * (1 - 0.9**3)) / math.log(0.9)
    assert first[f"{name}/exp_avg"] == pytest.approx(age + 3)
    age = math.log(1 - 0.25 * (1 - 0.95**3)) / math.log(0.95) + 3
    assert first[f"{name}/exp_avg_sq"] == pytest.approx(age)
    assert second[f"{name}/exp_avg_sq"] == pytest.approx(age * math.log(0.95) / math.log(0.99) + 3)
    assert {count for key, count in alone["lion and back"][1]["counts"].items() if key.endswith("_sq")} == {4.0}
