"""The step benchmark: what it measures, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megacpt.bench.plain import PlainModel
from megacpt.bench.step import DEFAULT_MODEL, bench_config
from megacpt.config import ModelConfig
from megacpt.errors import ConfigError, LayoutError
from tests.pool import Pools


def test_it_measures_both_sides_in_turns(pools: Pools) -> None:
    (found,) = pools(1).run("tests.bench.cases:measured", overrides=[], blocks=3)
    series = found["series"]
    for side in ("engine", "plain"):
        assert len(series[side]["blocks"]) == 3
        assert series[side]["work"] == 4 * 16
        for whole, passes in zip(
            series[side]["blocks"], series[f"{side}: forward and backward"]["blocks"], strict=True
        ):
            assert all(0 < part < time for part, time in zip(passes, whole, strict=True))
    ratio = found["figures"]["engine / plain"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert found["config"]["batch"]["seq_length"] == 16
    assert found["machine"]["threads"] == 1


def test_two_models_that_differ_are_not_timed(pools: Pools) -> None:
    (message,) = pools(1).run("tests.bench.cases:measured", overrides=["model.init_std=0.5"], sabotage=True)
    assert "do not compute the same" in message


def test_the_default_has_about_ten_million_parameters() -> None:
    assert bench_config(None, None).model == ModelConfig.model_validate(DEFAULT_MODEL)
    assert 9e6 < ModelConfig.model_validate(DEFAULT_MODEL).parameters(257) < 11e6


def test_a_model_by_name_and_a_run_file(tmp_path: Path) -> None:
    assert bench_config(None, "tiny", ["batch.microbatch=1"]).model.hidden == 128
    run = tmp_path / "run.yaml"
    run.write_text(
        "run: r\nmodel: tiny\ntokenizer: bytes\nstage: {name: s, tokens: 1M, mixture: {s: nowhere}}\n"
        "optim: {peak_lr: 1e-3}\nbatch: {sequences: 2, seq_length: 64}\n"
    )
    assert bench_config(run, None, ["model=small"]).model.hidden == 512
    assert bench_config(run, None).batch.seq_length == 64
    with pytest.raises(ConfigError, match="not both"):
        bench_config(run, "tiny")


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ("parallel.tensor=2", "set parallel.tensor=1"),
        ("recompute=full", "set recompute=none"),
        ("batch.microbatch=3", "no multiple of batch.microbatch"),
    ],
)
def test_what_the_plain_loop_cannot_do_is_refused(change: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        bench_config(None, None, [change])


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "relu2glu"},
        {"norm": "layernorm"},
        {"norm_place": "output"},
        {"parallel_residual": True},
        {"sub_norm": True},
        {"window": 8},
        {"qk_norm": "all_heads"},
        {"latent": {"kv_rank": 8, "plain_dim": 8, "rope_dim": 4, "value_dim": 8}},
        {"moe": {"experts": 4}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_networks_that_are_not_written_plainly_are_refused(change: dict[str, Any]) -> None:
    model = ModelConfig.model_validate({"layers": 1, "hidden": 32, "ffn": 48, "heads": 4, **change})
    with pytest.raises(ConfigError, match=rf"model\.{next(iter(change))}: "):
        PlainModel(model, 64)


def test_more_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LayoutError, match="without torchrun"):
        bench_config(None, None)
