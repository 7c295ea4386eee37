"""Packed folders generate what the checkpoint does that they were made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megacpt.config import dump
from megacpt.convert.packed_folder import PackedFolder
from megacpt.errors import CheckpointError, ConfigError
from megacpt.serve.opened import open_decoder
from tests.cli.command import megacpt
from tests.pool import Pools
from tests.small import make_stream, run_config

CASES = "tests.serve.cases"
PROMPTS = ["the ship ", "of the old sailor and", "a"]
LONG = {"max_seq_length": 128, "layers": 3, "hidden": 64, "heads": 4, "kv_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "ternary": {"quantise": {"grid": "ternary"}, "qk_norm": True},
    "groups": {"quantise": {"grid": "ternary", "scale": {"scope": "group", "group": 16}}},
    "shards": {"quantise": {"grid": "ternary", "scale": {"scope": "shard", "shards": 2}, "parts": ["mlp"]}},
    "binary": {"quantise": {"grid": "binary"}, "tied_embeddings": True},
    "int4": {"quantise": {"grid": "int", "bits": 4}},
    "fp8": {"quantise": {"grid": "ternary", "activations": "fp8"}},
}


def train_and_pack(folder: Path, model: dict[str, Any]) -> tuple[Path, Path]:
    stream = str(make_stream(folder, "english"))
    config = run_config(folder / "run", {"english": stream}, steps=8, model={**LONG, **model}, optim={"peak_lr": 2e-2})
    (folder / "run.yaml").write_text(dump(config))
    for arguments in (("train", "run.yaml"), ("convert", "pack", "run", "--out", "packed")):
        done = megacpt(*arguments, folder=folder)
        assert done.status == 0, done.err
    return folder / "run", folder / "packed"


@pytest.fixture(scope="module")
def ternary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return train_and_pack(tmp_path_factory.mktemp("serve"), MODELS["ternary"])


def test_greedy_and_sampled_tokens_are_those_of_the_checkpoint(pools: Pools, ternary: tuple[Path, Path]) -> None:
    run, folder = ternary
    (found,) = pools(1).run(f"{CASES}:side_by_side", run=run, folder=folder, prompts=PROMPTS, max_tokens=64)
    assert found["folder"] == found["checkpoint"]
    assert [len(tokens) for tokens in found["folder"]] == [64] * 6
    assert len({tuple(tokens) for tokens in found["folder"]}) > 3


@pytest.mark.parametrize("name", [name for name in MODELS if name != "ternary"])
def test_every_form_computes_what_its_checkpoint_does(pools: Pools, name: str, tmp_path: Path) -> None:
    run, folder = train_and_pack(tmp_path, MODELS[name])
    ((far, size),) = pools(1).run(f"{CASES}:distance", run=run, folder=folder, text="the old ship and the wind")
    assert far < (1e-2 if name == "fp8" else 1e-5) * size  # a rounding of the last bit may move an activation by a step
    folder_of = PackedFolder(folder)
    if name == "int4":
        for activations in ("int8", "fp8"):
            with pytest.raises(ConfigError, match=f"--activations {activations}: .* are int-4bit"):
                open_decoder(folder, activations)
    assert open_decoder(folder)[0].activations == (folder_of.activations or "float")


def test_the_command_takes_a_folder(ternary: tuple[Path, Path], tmp_path: Path) -> None:
    options = ("--prompt", "the ship ", "--max-tokens", "20", "--temperature", "0.7", "--seed", "2")
    found = [megacpt("generate", path, *options, folder=tmp_path) for path in ternary]
    assert found[1].status == 0, found[1].err
    assert found[1].out == found[0].out
    assert found[1].out.startswith("the ship ")
    assert "20 tokens, " in found[1].err
    rounded = megacpt("generate", ternary[1], *options, "--activations", "int8", "--device", "cpu", folder=tmp_path)
    assert rounded.status == 0, rounded.err
    assert rounded.out.startswith("the ship ")


@pytest.mark.parametrize(
    ("which", "options", "words"),
    [
        (0, ("--activations", "int8"), ("--activations int8", "megacpt convert pack")),
        (1, ("parallel.tensor=2",), ("parallel.tensor=2", "runs as it was written")),
        (1, ("--prompt", "x" * 128), ("128 tokens", "model.max_seq_length")),
        (1, ("--top-k", "0"), ("top-k 0",)),
        (1, ("--activations", "int4"), ("int4",)),
        (1, ("--device", "cuda"), ("--device cuda", "no CUDA device")),
        (0, ("--device", "cpu"), ("--device is for packed folders", "MEGACPT_DEVICE")),
    ],
)
def test_mistakes_end_with_status_2(
    ternary: tuple[Path, Path], tmp_path: Path, which: int, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    prompt = () if "--prompt" in options else ("--prompt", "x")
    found = megacpt("generate", ternary[which], *prompt, *options, folder=tmp_path)
    assert found.status == 2
    assert all(word in found.err for word in words), found.err
    assert "Traceback" not in found.err


def test_on_cuda_it_computes_in_bfloat16_and_refuses_what_has_no_kernel(
    ternary: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, asked = torch.device("cuda"), []
    monkeypatch.setattr("megacpt.serve.opened.Decoder", lambda *arguments: asked.append(arguments[1:]))
    open_decoder(ternary[1], device=cuda)
    open_decoder(ternary[1], "fp8", cuda)
    assert asked == [("float", cuda, torch.bfloat16), ("fp8", cuda, torch.bfloat16)]
    with pytest.raises(ConfigError, match="--activations int8: CUDA has no kernel for it"):
        open_decoder(ternary[1], "int8", cuda)


def test_what_training_rounded_is_rounded_or_said(
    ternary: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(ternary[1], tmp_path / "packed")
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"]["activations"] = "int8"
    (folder / "config.json").write_text(json.dumps(content))
    assert open_decoder(folder)[0].activations == "int8"
    assert "rounded to int8; here they are rounded to 8 bits by blocks of 256" in caplog.text
    asked = []
    monkeypatch.setattr("megacpt.serve.opened.Decoder", lambda *arguments: asked.append(arguments[1]))
    open_decoder(folder, device=torch.device("cuda"))
    assert asked == ["float"]
    assert "here they are multiplied as they are" in caplog.text


def test_a_folder_that_cannot_run_says_why(ternary: tuple[Path, Path], tmp_path: Path) -> None:
    content = json.loads((ternary[1] / "config.json").read_text())

    def refused(**changes: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps({**content, **changes}))
        with pytest.raises(CheckpointError) as caught:
            open_decoder(tmp_path)
        return str(caught.value)

    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"")
    without = megacpt("generate", tmp_path, "--prompt", "x", folder=tmp_path)
    assert without.status == 2
    assert "config.json" in without.err
    assert "convert pack" in refused(quantization_config={})
    assert "ternary-9bit" in refused(quantization_config={**content["quantization_config"], "format": "ternary-9bit"})
