"""Checkpoints of GPT-NeoX come in joined over their ranks; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megacpt.checkpoint.store import checkpoints
from megacpt.continuation.ledger import Ledger
from tests.pool import Pools
from tests.small import make_streams, run_mapping

CASES = "tests.convert.megatron_cases"
MODEL: dict[str, Any] = {
    "layers": 3, "hidden": 32, "ffn": 128, "heads": 4, "kv_heads": 4, "activation": "gelu", "norm": "layernorm",
    "bias": True, "parallel_residual": True, "rope": {"share": 0.25}, "vocab_multiple": 64, "vocab_size": 320,
    "max_seq_length": 64,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "num-layers": 3, "hidden-size": 32, "num-attention-heads": 4, "max-position-embeddings": 64, "pos-emb": "rotary",
    "rotary-pct": 0.25, "gpt-j-residual": True, "no-weight-tying": True, "norm": "layernorm", "bias-gelu-fusion": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    streams = make_streams(tmp_path_factory.mktemp("streams"))
    config = run_mapping(tmp_path_factory.mktemp("runs") / "neox", {"english": streams["english"]}, 2, model=MODEL)
    return Path(pools(1).run("tests.convert.cases:make_run", config=config)[0])


def saved(pools: Pools, run: Path, folder: Path, settings: dict[str, Any] | None = None, **options: Any) -> Path:
    """A folder as GPT-NeoX saves it."""
    found = {"ranks": 1, "per_layer": True, "naming": "dense", **options}
    pools(1).run(f"{CASES}:neox_of", run=str(run), folder=str(folder), **found)
    (folder / "configs").mkdir()
    (folder / "configs" / "model.yml").write_text(yaml.safe_dump(SETTINGS if settings is None else settings))
    return folder


def adopt(pools: Pools, source: Path, out: Path, **options: Any) -> dict[str, Any]:
    options = {"allow_pickle": True, **options}
    found: dict[str, Any] = pools(1).run(f"{CASES}:adopted", source=str(source), out=str(out), kind="neox", **options)[
        0
    ]
    return found


@pytest.mark.parametrize(
    ("ranks", "per_layer", "naming"),
    [(1, True, "dense"), (2, True, "linear"), (2, False, "dense"), (4, False, "linear")],
)
def test_weights_come_in_whatever_the_ranks(
    pools: Pools, run: Path, tmp_path: Path, ranks: int, per_layer: bool, naming: str
) -> None:
    """Sums and means of four parts of a power of two are exact, so that every weight is bitwise what it was."""
    folder = saved(pools, run, tmp_path / "neox", ranks=ranks, per_layer=per_layer, naming=naming)
    found = adopt(pools, folder, tmp_path / "run")
    assert "error" not in found, found
    assert any("tanh" in note for note in found["notes"])
    same = [str(checkpoints(run)[-1]), found["checkpoint"]]
    assert pools(1).run("tests.convert.cases:different_weights", checkpoints=same)[0] == []
    ledger = Ledger.read(Path(found["checkpoint"]))
    assert ledger.derived is not None
    assert (ledger.derived["operation"], ledger.derived["family"]) == ("from-neox", "gpt_neox")


def test_pickles_are_read_when_they_are_allowed_only(pools: Pools, run: Path, tmp_path: Path) -> None:
    folder = saved(pools, run, tmp_path / "neox")
    kind, text = adopt(pools, folder, tmp_path / "run", allow_pickle=False)["error"]
    assert (kind, "--allow-pickle" in text) == ("ConfigError", True)
    torch.save({"norm.weight": torch.ones(3), "code": Path}, folder / "layer_06-model_00-model_states.pt")
    kind, text = adopt(pools, folder, tmp_path / "run")["error"]
    assert kind == "CheckpointError"
    assert "layer_06-model_00" in text
    assert not (tmp_path / "run").exists()


def test_a_missing_rank_or_tensor_is_named(pools: Pools, run: Path, tmp_path: Path) -> None:
    folder = saved(pools, run, tmp_path / "neox", ranks=2)
    (folder / "layer_03-model_01-model_states.pt").unlink()
    kind, text = adopt(pools, folder, tmp_path / "run")["error"]
    assert kind == "CheckpointError"
    assert "1 of 2 tensor-parallel ranks" in text
    whole = saved(pools, run, tmp_path / "whole")
    (whole / "layer_07-model_00-model_states.pt").unlink()
    kind, text = adopt(pools, whole, tmp_path / "run")["error"]
    assert kind == "CheckpointError"
    assert "embed_out.weight [320, 32] is missing" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pos-emb": "alibi"}, "pos_emb: alibi"),
        ({"pos-emb": None}, "pos_emb"),
        ({"norm": "rmsnorm"}, "norm: rmsnorm"),
        ({"activation": "swiglu"}, "activation: swiglu"),
        ({"num-kv-heads": 2}, "num_kv_heads: 2"),
        ({"gpt-j-tied": True}, "gpt_j_tied: True"),
    ],
)
def test_settings_that_ask_for_more_are_refused(
    pools: Pools, run: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = saved(pools, run, tmp_path / "neox", {**SETTINGS, **changes})
    kind, text = adopt(pools, folder, tmp_path / "run")["error"]
    assert (kind, said in text) == ("ConfigError", True), text


def test_settings_may_lie_elsewhere(pools: Pools, run: Path, tmp_path: Path) -> None:
    folder = saved(pools, run, tmp_path / "neox")
    (folder / "configs" / "model.yml").rename(tmp_path / "mine.yml")
    kind, text = adopt(pools, folder, tmp_path / "run")["error"]
    assert (kind, "--config" in text) == ("ConfigError", True)
    found = adopt(pools, folder, tmp_path / "run", settings=str(tmp_path / "mine.yml"))
    assert "error" not in found, found
