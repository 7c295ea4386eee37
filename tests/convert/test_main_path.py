"""The main path: a public model comes in, goes on with new data and replay of data like its own, goes out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from megacpt.checkpoint.store import checkpoints
from megacpt.continuation.ledger import Ledger
from tests.cli.command import megacpt
from tests.convert.hf_models import save
from tests.pool import Pools
from tests.small import STEP, make_streams

pytest.importorskip("transformers", reason="the package transformers (extra hf) makes the model")
CASES = "tests.convert.main_path_cases"
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a user: a model that was downloaded, streams, and a stage."""
    folder = tmp_path_factory.mktemp("user")
    save("llama", folder / "public")
    streams = make_streams(folder / "data")
    stage = {
        "stage": {
            "name": "python",
            "tokens": STEPS * STEP,
            "mixture": {"python": streams["python"]},
            "replay": {"share": "25%", "policy": "external", "streams": {"proxy": streams["english"]}},
        },
        "schedule": {"kind": "rewarmed_cosine", "warmup": "2 steps"},
        "optim": {"peak_lr": 5e-3},
        "batch": {"sequences": 8, "seq_length": 16, "microbatch": 2},
        "checkpoint": {"every": "4 steps"},
        "log": {"every": "1 steps", "tensorboard": False},
        "evaluate": {
            "streams": {name: streams[f"{name}-valid"] for name in ("python", "english")},
            "every": "100%",
            "tokens": 400,
        },
    }
    (folder / "stage.yaml").write_text(yaml.safe_dump(stage))
    return folder


def run(folder: Path, *arguments: str) -> str:
    found = megacpt(*arguments, folder=folder, timeout=240)
    assert found.status == 0, found.err
    return found.out + found.err


@pytest.fixture(scope="module")
def path(folder: Path) -> str:
    """The three commands; what they said."""
    said = run(folder, "convert", "from-hf", "public", "runs/public", "--tokenizer", "bytes")
    said += run(folder, "continue", "runs/public", "stage.yaml", "--run", "runs/python")
    return said + run(folder, "convert", "to-hf", "runs/python", "--out", "python-hf")


def test_three_commands_take_a_public_model_on(folder: Path, path: str) -> None:
    assert "same function" in path  # both conversions were verified
    ledger = Ledger.read(checkpoints(folder / "runs" / "python")[-1])
    assert [stage.name for stage in ledger.stages] == ["from-hf", "python"]
    assert ledger.stage.tokens == STEPS * STEP
    assert ledger.stage.consumed["replay-proxy"] == STEPS * STEP // 4
    for name in ("runs/public", "python-hf"):
        card = json.loads((folder / name / "verification.json").read_text())
        assert card["passed"]
        assert card["same_choice"] == 1.0
    losses = [json.loads(line) for line in (folder / "runs/python/metrics.jsonl").read_text().splitlines()]
    trained = [line["loss"] for line in losses if "loss" in line]
    assert trained[-1] < trained[0] - 0.5


@pytest.mark.usefixtures("path")
def test_the_export_is_the_family_that_came_in(folder: Path) -> None:
    came, went = (json.loads((folder / name / "config.json").read_text()) for name in ("public", "python-hf"))
    assert came["model_type"] == went["model_type"] == "llama"
    for key in ("hidden_size", "num_key_value_heads", "vocab_size", "rms_norm_eps", "tie_word_embeddings"):
        assert came[key] == went[key]


@pytest.mark.usefixtures("path")
def test_lm_eval_scores_the_export_as_the_run(pools: Pools, folder: Path) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's backend for Hugging Face wants accelerate")
    requests = [["the sea was", " old"], ["def f(", "x): return x"], ["he was", " in the wind"], ["", "night"]]
    ours, theirs = (
        pools(1).run(f"{CASES}:{case}", folder=str(folder / name), requests=requests)[0]
        for case, name in (("scored_here", "runs/python"), ("scored_by_hugging_face", "python-hf"))
    )
    np.testing.assert_allclose([nats for nats, _ in ours], [nats for nats, _ in theirs], atol=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_where_to_write_is_said_once(folder: Path) -> None:
    for arguments, said in ((("public",), "say where to write"), (("public", "x", "--out", "y"), "named already, x")):
        found = megacpt("convert", "from-hf", *arguments, folder=folder)
        assert found.status == 2
        assert said in found.err
