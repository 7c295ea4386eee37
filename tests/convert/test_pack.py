"""Packed folders hold what the model computes with, whatever the grid, the scales and the layout that wrote it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megacpt.continuation.ledger import Ledger
from megacpt.convert.packed_folder import PackedFolder, is_packed_folder
from megacpt.convert.safetensors_writer import INDEX, Planned, new_folder
from megacpt.errors import CheckpointError, ConfigError
from megacpt.ops.ternarise import TERNARISE
from tests.cli.command import megacpt as command
from tests.convert.exports import TERNARY, ask, export, refused, trained
from tests.convert.memory import peak_of
from tests.pool import Pools
from tests.small import make_stream

GRIDS: dict[str, dict[str, Any]] = {
    "ternary": {"quantise": TERNARY},
    "shards": {"quantise": {"grid": "ternary", "scale": {"scope": "shard", "shards": 2}}, "kv_heads": 2, "heads": 4},
    "groups": {"quantise": {"grid": "ternary", "scale": {"scope": "group", "group": 16}, "parts": ["mlp"]}},
    "binary": {"quantise": {"grid": "binary"}, "tied_embeddings": True},
    "int3": {"quantise": {"grid": "int", "bits": 3, "scale": {"scope": "group", "group": 8, "format": "bfloat16"}}},
    "biases": {"quantise": {**TERNARY, "activations": "int8"}, "bias": True},
}


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_stream(tmp_path_factory.mktemp("streams"), "english"))


@pytest.fixture(scope="module")
def ternary(pools: Pools, stream: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(pools, tmp_path_factory.mktemp("runs") / "ternary", stream, model=GRIDS["ternary"])


@pytest.fixture(scope="module")
def plain(pools: Pools, stream: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(pools, tmp_path_factory.mktemp("runs") / "float", stream)


def same_weights(pools: Pools, checkpoint: Path, folder: Path) -> None:
    due = ask(pools, "plain_weights", checkpoint=str(checkpoint))
    found = ask(pools, "packed_weights", folder=str(folder))
    assert set(found) == set(due)
    for name, weight in due.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_folder_holds_the_weights_of_the_model(pools: Pools, stream: str, tmp_path: Path, grid: str) -> None:
    checkpoint = trained(pools, tmp_path / "run", stream, model=GRIDS[grid])
    export(pools, "pack", checkpoint, tmp_path / "packed")
    same_weights(pools, checkpoint, tmp_path / "packed")
    folder = PackedFolder(tmp_path / "packed")
    assert folder.model.quantise is not None
    assert folder.model.quantise.grid == GRIDS[grid]["quantise"]["grid"]
    assert folder.activations == GRIDS[grid]["quantise"].get("activations")
    assert folder.tokenizer().spec == "bytes"
    assert Ledger.read(tmp_path / "packed").stage.steps == 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("grid", ["ternary", "shards", "binary"])
def test_packed_matrices_are_those_that_the_run_computes_with(
    pools: Pools, stream: str, tmp_path: Path, grid: str, precision: str
) -> None:
    checkpoint = trained(pools, tmp_path / "run", stream, model=GRIDS[grid], precision=precision)
    export(pools, "pack", checkpoint, tmp_path / "packed")
    found = ask(pools, "packed_weights", folder=str(tmp_path / "packed"))
    for name, matrix in ask(pools, "used_weights", checkpoint=str(checkpoint)).items():
        np.testing.assert_array_equal(found[name], matrix, err_msg=name)


def test_five_trits_a_byte_are_the_same_weights_in_less_space(pools: Pools, ternary: Path, tmp_path: Path) -> None:
    sizes = {}
    for bits in ("2", "1.6"):
        export(pools, "pack", ternary, tmp_path / bits, bits=bits)
        same_weights(pools, ternary, tmp_path / bits)
        stored = PackedFolder(tmp_path / bits).stored_bytes()
        sizes[bits] = [codes for name, (_, codes, _) in stored.items() if "proj" in name]
    # Rows of 32 and 48 codes: 8 and 12 bytes, or 7 and 10.
    assert sum(sizes["2"]) == 2 * (4 * 32 * 8 // 4 * 3 + 3 * 48 * 32 // 4)
    assert sum(sizes["1.6"]) == 2 * (96 * 7 + 96 * 7 + 32 * 10)


def test_shards_of_two_ranks_pack_as_they_compute(pools: Pools, stream: str, tmp_path: Path) -> None:
    model = {**GRIDS["shards"]}
    checkpoint = trained(pools, tmp_path / "run", stream, ranks=2, model=model, parallel={"tensor": 2})
    export(pools, "pack", checkpoint, tmp_path / "packed")
    same_weights(pools, checkpoint, tmp_path / "packed")
    folder = PackedFolder(tmp_path / "packed")
    assert folder.quantised("model.layers.0.mlp.up_proj.weight").scales.shape == (2, 1)
    assert folder.quantised("model.layers.0.mlp.down_proj.weight").scales.shape == (1, 2)


def test_a_rounded_model_packs_without_loss(pools: Pools, plain: Path, tmp_path: Path) -> None:
    export(pools, "round_to_nearest", plain, tmp_path / "rounded", bits=4, group=16)
    (rounded,) = (tmp_path / "rounded" / "checkpoints").iterdir()
    export(pools, "pack", rounded, tmp_path / "packed")
    same_weights(pools, rounded, tmp_path / "packed")
    folder = PackedFolder(tmp_path / "packed")
    assert folder.format.name == "int-4bit"
    # Each weight lies within half a step of where it was, and the largest of a group on the outermost level.
    before = ask(pools, "plain_weights", checkpoint=str(plain))
    name = "model.layers.1.mlp.down_proj.weight"
    found = folder.quantised(name)
    step = found.scales.repeat_interleave(16, 1)
    assert bool(((torch.from_numpy(before[name]) - found.dense()).abs() <= 0.502 * step).all())
    assert bool((found.codes.view(32, 3, 16).abs().amax(-1) == 7).all())


def test_a_rounded_model_is_evaluated_and_says_what_it_is(
    pools: Pools, plain: Path, stream: str, tmp_path: Path
) -> None:
    out = tmp_path / "rounded"
    done = command("convert", "quantise", plain, "--bits", "8", "--group", "16", "--out", out, folder=tmp_path)
    assert done.status == 0, done.err
    derived = json.loads((out / "start.json").read_text())["derived"]
    assert derived["operation"] == "round-to-nearest"
    assert derived["grid"]["bits"] == 8
    losses = []
    for folder in (plain, out):
        done = command("eval", folder, "--stream", stream, "--json", "loss.json", folder=tmp_path)
        assert done.status == 0, done.err
        losses.append(json.loads((tmp_path / "loss.json").read_text())["streams"][0]["loss"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    again = refused(pools, "round_to_nearest", plain, out, bits=8, group=16)
    assert again == ("ConfigError", f"{out} holds a run already: choose another --out, or remove it")


def test_files_are_cut_at_tensors(pools: Pools, ternary: Path, tmp_path: Path) -> None:
    export(pools, "pack", ternary, tmp_path / "packed", shard_bytes=20_000)
    index = json.loads((tmp_path / "packed" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    same_weights(pools, ternary, tmp_path / "packed")


@pytest.mark.parametrize(
    ("options", "says"),
    [({"bits": "3"}, "--bits 3: ternary weights are packed in 2 bits"), ({"out": "."}, "exists: choose another")],
)
def test_what_does_not_fit_is_refused(
    pools: Pools, ternary: Path, tmp_path: Path, options: dict[str, str], says: str
) -> None:
    out = tmp_path / options.pop("out", "packed")
    found = refused(pools, "pack", ternary, out, **options)
    assert found is not None
    assert found[0] == "ConfigError"
    assert says in found[1]
    assert not list(tmp_path.iterdir())


def test_a_float_model_has_nothing_to_pack(pools: Pools, plain: Path, tmp_path: Path) -> None:
    found = refused(pools, "pack", plain, tmp_path / "packed")
    assert found is not None
    assert "no quantised matrices" in found[1]
    assert "megacpt convert quantise" in found[1]


def test_a_full_disk_leaves_nothing(ternary: Path, tmp_path: Path) -> None:
    full = command("convert", "pack", ternary, "--out", "packed", folder=tmp_path, largest_file=4000)
    assert full.status == 2
    assert "packed: the file size limit is reached; nothing is left of it" in full.err
    assert not [path for path in tmp_path.iterdir() if "packed" in path.name]


def test_a_damaged_folder_is_named(pools: Pools, ternary: Path, tmp_path: Path) -> None:
    export(pools, "pack", ternary, tmp_path / "packed")
    assert is_packed_folder(tmp_path / "packed")
    assert not is_packed_folder(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    short = shutil.copytree(tmp_path / "packed", tmp_path / "short")
    (file,) = short.glob("*.safetensors")
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 10)
    with pytest.raises(CheckpointError, match=f"{file.name} is missing or damaged"):
        PackedFolder(short).quantised(name)
    other = shutil.copytree(tmp_path / "packed", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["megacpt"]["model"]["ffn"] = 40
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{name} is not of the model"):
        PackedFolder(other).quantised(name)
    config["quantization_config"]["format"] = "ternary-1bit"
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'ternary-1bit' is unknown"):
        PackedFolder(other)
    (other / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no folder of `megacpt convert pack`"):
        PackedFolder(other)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "quantization_config", "ternary"),
        ("config.json", "vocab_size", None),
        ("config.json", "megacpt", {"model": {"layers": 0}}),
        (INDEX, "weight_map", None),
        (INDEX, "weight_map", {"model.norm.weight": "../model.safetensors"}),
    ],
)
def test_a_description_that_is_none_is_an_error(
    pools: Pools, ternary: Path, tmp_path: Path, file: str, key: str, value: Any
) -> None:
    export(pools, "pack", ternary, tmp_path / "packed")
    path = tmp_path / "packed" / file
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, key: value}))
    with pytest.raises(CheckpointError, match="packed"):
        PackedFolder(tmp_path / "packed")


def test_a_tensor_that_was_not_written_is_missed(tmp_path: Path) -> None:
    plan = [Planned("a", torch.float32, (2,)), Planned("b", torch.uint8, (3,))]

    def write_half() -> None:
        with new_folder(tmp_path / "out", plan, {}, {}) as folder:
            folder.write("a", torch.zeros(2))

    with pytest.raises(CheckpointError, match="b was never written"):
        write_half()
    assert not list(tmp_path.iterdir())


def test_what_the_disk_lost_is_noticed(tmp_path: Path) -> None:
    plan = [Planned("a", torch.float32, (4,))]

    def write_and_lose() -> None:
        with new_folder(tmp_path / "out", plan, {}, {}) as folder:
            folder.write("a", torch.ones(4))
            (file,) = folder.folder.glob("*.safetensors")
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)

    with pytest.raises(CheckpointError, match="does not hold what was written"):
        write_and_lose()


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists"), new_folder(tmp_path / "out", [], {}, {}):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("operation", ["pack", "to_hf", "to_gguf"])
def test_memory_is_that_of_one_layer(stream: str, tmp_path: Path, operation: str) -> None:
    if operation == "to_gguf":
        pytest.importorskip("gguf", reason="GGUF needs the package gguf")
    if TERNARISE.choose("cpu", torch.float32).backend != "cpu":
        pytest.skip("the CPU kernels are not built, and their reference takes copies in float64")
    model = {"layers": 4, "hidden": 768, "ffn": 2048, "heads": 8, "kv_heads": 8, "quantise": TERNARY}
    layer = 4 * (4 * 768**2 + 3 * 768 * 2048)
    peak, whole = peak_of(tmp_path, stream, {**model, "vocab_size": 8_000}, operation)
    assert whole > 4 * layer
    assert peak < 1.3 * layer, f"{peak / layer:.2f} layers"
