"""Recipes run, go on where they stopped, and measure what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megacpt.checkpoint.store import checkpoints
from megacpt.continuation.ledger import Ledger
from megacpt.data.plan import Curriculum
from tests.pool import Pools

CASE = "tests.recipes.cases:recipe"
STEPS = {"still": 8, "moved": 8, "later-0": 8, "later-50": 8, "release": 4, "experts": 8}


@pytest.fixture(scope="module")
def whole(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The tiny recipe with two seeds, without interruption."""
    out = tmp_path_factory.mktemp("recipe") / "out"
    return out, pools(1).run(CASE, out=str(out), seeds=2)[0]


def last_ledger(run: Path) -> Ledger:
    return Ledger.read(checkpoints(run)[-1])


def test_every_run_is_trained_from_where_it_says(whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    assert result["steps"] == 2 * sum(STEPS.values())
    for seed in (1001, 1002):
        folder = out / f"seed-{seed}"
        found = {name: last_ledger(folder / name) for name in (*STEPS, "mean")}
        assert {name: ledger.stage.steps for name, ledger in found.items() if name != "mean"} == STEPS
        moved = [Ledger.read(path).id for path in checkpoints(folder / "moved")]
        assert [found["later-0"].parent, found["release"].parent] == [moved[2], moved[3]]
        assert found["mean"].derived == {"operation": "average", "of": moved[1:], "weights": [0.25, 0.25, 0.5]}
        assert found["later-50"].stage.seed == seed
        assert found["later-50"].stage.consumed == {"python": 4 * 4 * 32, "replay-english": 4 * 4 * 32}
        assert found["release"].stage.kind == "anneal"
        (source,) = found["still"].stage.plan.sources
        assert source.segments[0].curriculum == Curriculum("ascending", 16)


def test_measures_are_those_of_the_metrics(whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    lines = [json.loads(line) for line in (out / "seed-1002" / "moved" / "metrics.jsonl").read_text().splitlines()]
    curve = {
        name: {
            line["step"]: line["bits_per_byte"] for line in lines if line["kind"] == "eval" and line["stream"] == name
        }
        for name in ("english", "python")
    }
    measures = {name: values[1] for name, values in result["measures"]["moved"].items()}
    assert measures["english"] == curve["english"][8]
    assert measures["both"] == pytest.approx((curve["english"][8] + curve["python"][8]) / 2)
    assert measures["before"] == curve["english"][0]
    assert measures["highest"] == curve["english"][4]
    assert set(result["measures"]["mean"]) == {"english", "both", "far"}


def test_routing_is_measured_where_there_are_experts(whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    measures = result["measures"]
    assert set(measures["experts"]) - set(measures["moved"]) == {"far-load", "kept", "batches"}
    text = (out / "seed-1001" / "experts" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    trained = [line["moe/layer-1/max_load"] for line in lines if line["kind"] == "train" and line["step"] > 4]
    (routed,) = (
        line["max_load"]
        for line in lines
        if line["kind"] == "routing" and (line["step"], line["stream"]) == (8, "rot13")
    )
    found = {name: values[0] for name, values in measures["experts"].items()}
    assert len(trained) == 2
    assert (found["batches"], [found["far-load"]], found["kept"]) == (max(trained), routed, 1.0)
    assert measures["experts"]["far"] < measures["still"]["far"]


def test_the_findings_follow_from_the_measures(whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    measures, rows = result["measures"], {row[0]: row for row in result["rows"]}
    differences = [a - b for a, b in zip(measures["moved"]["english"], measures["still"]["english"], strict=True)]
    assert max(differences) < 0
    assert rows["moved - still"][2] == f"{sum(differences) / 2:+.4f}"
    assert rows["moved - still"][4].startswith("as claimed")
    assert rows["later, 50 %"][1:] == ("within 0.1", "+0.0000", "+0.0000 to +0.0000", "as claimed")
    content = json.loads((out / "result.json").read_text())
    assert content["findings"][0]["values"] == differences
    assert content["recipe"]["constants"]["tokens"] == "1k"
    assert content["seeds"] == [1001, 1002]
    page = (out / "result.md").read_text()
    assert "| moved - still | below 0 |" in page
    assert "model: llama3-8b" in page


def test_a_recipe_that_is_done_is_only_measured(pools: Pools, whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    (again,) = pools(1).run(CASE, out=str(out), seeds=2)
    assert again["steps"] == 0
    assert again["rows"] == result["rows"]
    assert again["seconds"] == result["seconds"]


def test_a_stopped_recipe_goes_on_and_ends_the_same(
    pools: Pools, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    (first,) = pools(1).run(CASE, out=str(tmp_path / "out"), seeds=1, stop_at=11)
    assert not first["complete"]
    assert first["said"][-1] == "[2/7] seed 1001: moved"
    (last,) = pools(1).run(CASE, out=str(tmp_path / "out"), seeds=1)
    assert first["steps"] + last["steps"] == sum(STEPS.values())
    expected = {name: {key: values[:1] for key, values in m.items()} for name, m in whole[1]["measures"].items()}
    assert last["measures"] == expected


def test_more_runs_of_the_same_settings_go_beside_those_that_are_there(
    pools: Pools, whole: tuple[Path, dict[str, Any]]
) -> None:
    out, result = whole
    (fewer,) = pools(1).run(CASE, out=str(out), seeds=2, changes=["shares=[0]"])
    assert "later-50" not in fewer["measures"]
    assert fewer["steps"] == 0
    (all_,) = pools(1).run(CASE, out=str(out), seeds=2)
    assert all_["steps"] == 0
    assert all_["measures"] == result["measures"]
    (more,) = pools(1).run(CASE, out=str(out), seeds=1, changes=["shares=[0, 25]"])
    assert more["steps"] == STEPS["later-50"]
    (found,) = pools(1).run(CASE, out=str(out), seeds=1, changes=["shares=[0, 25]", "peak=2.0e-2"])
    assert found["error"][0] == "ConfigError"


def test_other_settings_want_another_folder(pools: Pools, whole: tuple[Path, dict[str, Any]]) -> None:
    (found,) = pools(1).run(CASE, out=str(whole[0]), seeds=2, changes=["tokens=2k"])
    assert found["error"][0] == "ConfigError"
    assert "runs differ" in found["error"][1]
