"""The dense twin of a model with experts: a token costs the same in both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from megacpt.cli.config import app
from megacpt.config import ModelConfig, dump, load_model, load_run, run_from_mapping
from megacpt.config.twin import cost, dense_twin
from megacpt.errors import ConfigError
from tests.config.helpers import plain_run

MOE = {"experts": 8, "top_k": 3, "ffn": 88, "shared_ffn": 88}
BASE = {"layers": 4, "hidden": 128, "ffn": 352, "heads": 8, "kv_heads": 4, "vocab_size": 300}


def model(moe: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**BASE, **changes, "moe": moe})


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["dense-twin", *map(str, arguments)])


def test_a_weight_costs_six_flops() -> None:
    for dense in (model(), model(activation="gelu", qk_norm=True, tied_embeddings=True), model(head_dim=32)):
        norms = dense.hidden * (2 * dense.layers + 1) + (2 * dense.head_dim * dense.layers if dense.qk_norm else 0)
        lookup = 0 if dense.tied_embeddings else 384 * dense.hidden
        found = cost(dense, 1)
        assert found.flops - found.scores == 6 * (dense.parameters() - norms - lookup)
        assert found.active == found.parameters == dense.parameters()


def test_scores_by_hand() -> None:
    """Three tokens see 1, 2 and 3 keys: 6 products of 128 numbers each for scores and for what they weigh."""
    assert cost(model(layers=1), 3).scores * 3 == 3 * 2 * 2 * 6 * 128
    assert cost(model(layers=1, window=2), 3).scores * 3 == 3 * 2 * 2 * 5 * 128
    assert cost(model(layers=1, window=9), 3).scores == cost(model(layers=1), 3).scores


def test_latent_attention_costs_what_its_matrices_and_heads_do() -> None:
    latent = {"kv_rank": 24, "q_rank": 20, "plain_dim": 12, "rope_dim": 8, "value_dim": 10}
    found = model(latent=latent, kv_heads=8)
    norms = found.hidden * (2 * found.layers + 1) + (24 + 20) * found.layers
    costs = cost(found, 3)
    assert costs.flops - costs.scores == 6 * (found.parameters() - norms - 384 * found.hidden)
    assert costs.scores * 3 == 3 * 2 * 6 * found.layers * 8 * (20 + 10)


def test_the_twin_of_experts_in_all_layers() -> None:
    twin = dense_twin(model(MOE, name="granular"), 64)
    assert twin.dense == model(name="granular-dense", ffn=3 * 88 + 88, head_dim=16)
    before, after = twin.costs
    assert before.flops - before.router == after.flops
    assert before.router == 6 * 4 * 8 * 128
    assert before.active == after.active + 4 * 8 * 128
    assert before.parameters == twin.experts.parameters()
    assert twin.miss == 0
    assert "would match" not in twin.to_yaml()


@given(
    layers=st.integers(1, 12),
    ffn=st.integers(1, 700),
    top_k=st.integers(1, 8),
    expert=st.integers(1, 700),
    shared=st.integers(0, 700),
    every=st.integers(1, 3),
    multiple=st.sampled_from([1, 2, 8, 64]),
)
def test_one_width_for_all_layers_is_the_nearest(
    layers: int, ffn: int, top_k: int, expert: int, shared: int, every: int, multiple: int
) -> None:
    moe = {"experts": 8, "top_k": top_k, "ffn": expert, "shared_ffn": shared, "every": every}
    twin = dense_twin(model({**moe, "first_dense": layers - 1}, layers=layers, ffn=ffn), 64, multiple=multiple)
    assert twin.dense.ffn % multiple == 0
    before, after = twin.costs
    step = 6 * 3 * 128 * layers * multiple  # what the next multiple costs more
    assert abs(after.feed_forward - before.feed_forward) <= step / 2 or twin.dense.ffn == multiple
    assert twin.miss == pytest.approx(after.feed_forward / before.feed_forward - 1, abs=1e-12)


def test_a_miss_is_said() -> None:
    text = dense_twin(model({**MOE, "first_dense": 3}, ffn=351), 64).to_yaml()
    assert "# ffn: 351.25 would match; 351 costs 0.07% less in the feed-forward part." in text
    assert "384 costs" in dense_twin(model({**MOE, "first_dense": 3}), 64, multiple=128).to_yaml()


def test_without_a_vocabulary() -> None:
    twin = dense_twin(model(MOE, vocab_size=None), 64)
    known = dense_twin(model(MOE), 64)
    assert "the size of the vocabulary is not known" in twin.to_yaml()
    for found, whole in zip(twin.costs, known.costs, strict=True):
        assert found.output == 0
        assert whole.flops == found.flops + 6 * 384 * 128
        assert whole.parameters == found.parameters + 2 * 384 * 128


def test_a_dense_model_has_no_twin() -> None:
    assert str(call("tiny").exception) == "model.moe: tiny has no experts: it is dense already"


def test_a_model_file(tmp_path: Path) -> None:
    file, out, figures = tmp_path / "switch.yaml", tmp_path / "dense.yaml", tmp_path / "twin.json"
    file.write_text(dump(model(MOE)).partition("\n")[2])  # without a name, which is then that of the file
    result = call(file, "--out", out, "--json", figures, "--multiple", 64)
    assert (result.exit_code, result.output) == (0, "")
    assert load_model(out) == model(ffn=384, name="switch-dense", head_dim=16)
    content = json.loads(figures.read_text())
    assert ModelConfig.model_validate(content["model"]) == load_model(out)
    assert content["seq_length"] == 2048
    assert content["costs"]["dense"]["feed_forward"] == 6 * 3 * 4 * 128 * 384
    assert content["miss"] == pytest.approx(384 / 352 - 1)
    missing = call(file, "--out", tmp_path / "no" / "dense.yaml")
    assert isinstance(missing.exception, ConfigError)
    assert "cannot be written" in str(missing.exception)


def test_the_twin_of_a_run_trains_in_it(tmp_path: Path) -> None:
    data = plain_run()
    run = run_from_mapping({**data, "model": {**data["model"], "moe": MOE}, "parallel": {"expert": 2}})
    (tmp_path / "run.yaml").write_text(dump(run))
    result = call(tmp_path)
    assert result.exit_code == 0
    assert "attention, sequences of 256" in result.stdout
    assert "vocabulary is not known" not in result.stdout  # it is the tokenizer's
    (tmp_path / "dense.yaml").write_text(result.stdout)
    changed = load_run(tmp_path / "run.yaml", [f"model={tmp_path / 'dense.yaml'}", "parallel.expert=1"])
    assert changed.model == load_model(tmp_path / "dense.yaml")
    assert changed.model.moe is None
    assert call(tmp_path / "run.yaml").stdout == result.stdout


def test_help_has_examples() -> None:
    assert "megacpt config dense-twin runs/switch" in call("--help").output
