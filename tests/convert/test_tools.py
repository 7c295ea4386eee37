"""inspect, diff, task vectors, another vocabulary, other blocks: checkpoints tensor by tensor."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacpt.checkpoint.store import checkpoints
from megacpt.config import ModelConfig
from megacpt.continuation.ledger import Ledger
from megacpt.convert.inspection import Distance, Numbers, compare, damaged, inspect
from megacpt.errors import CheckpointError
from tests.cli.command import megacpt as command
from tests.pool import Pools
from tests.small import make_streams, run_mapping

CASES = "tests.convert.cases"
TENSOR: dict[str, Any] = {"parallel": {"tensor": 2}}
numbers = st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=40)
finite = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_streams(tmp_path_factory.mktemp("streams"))


@pytest.fixture(scope="module")
def run(pools: Pools, streams: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint after the steps 2, 4 and 6, by two ranks that share each matrix."""
    config = run_mapping(tmp_path_factory.mktemp("runs") / "english", {"english": streams["english"]}, **TENSOR)
    return Path(pools(2).run(f"{CASES}:make_run", config=config)[0])


def made(pools: Pools, operation: str, ranks: int = 1, **arguments: Any) -> Path:
    found = pools(ranks).run(f"{CASES}:made", operation=operation, **arguments)[0]
    assert "error" not in found, found
    return Path(found["checkpoint"])


def refused(pools: Pools, operation: str, **arguments: Any) -> tuple[str, str]:
    found: tuple[str, str] = pools(1).run(f"{CASES}:made", operation=operation, **arguments)[0]["error"]
    return found


def weights(pools: Pools, checkpoint: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = pools(1).run(f"{CASES}:whole_weights", checkpoint=str(checkpoint))[0]
    return found


@given(numbers, st.integers(0, 40))
def test_numbers_are_those_of_the_whole_however_it_is_cut(values: list[float], cut: int) -> None:
    tensor = torch.tensor(values)
    found, rest = Numbers(), Numbers()
    for part, sums in ((tensor[:cut], found), (tensor[cut:], rest)):
        sums.add(part)
    found.join(rest)
    good = tensor.double()[torch.isfinite(tensor)]
    assert (found.count, found.bad) == (len(values), len(values) - len(good))
    assert found.zeros == int((good == 0).sum())
    assert math.isclose(found.mean, float(good.mean()) if len(good) else 0.0, rel_tol=1e-9, abs_tol=1e-30)
    assert found.largest == (float(good.abs().max()) if len(good) else 0.0)


@given(finite, st.integers(0, 40), st.randoms(use_true_random=False))
def test_distances_are_those_of_the_whole_however_it_is_cut(values: list[float], cut: int, random: Any) -> None:
    a = torch.tensor(values)
    b = torch.tensor([value if random.random() < 0.5 else value + random.uniform(-1, 1) for value in values])
    found, rest = Distance(), Distance()
    found.add(a[:cut], b[:cut])
    rest.add(a[cut:], b[cut:])
    found.join(rest)
    apart = (a.double() - b.double()).norm()
    assert found.equal == int((a == b).sum())
    assert math.isclose(found.apart, float(apart**2), rel_tol=1e-9, abs_tol=1e-12)
    if float(a.norm()) > 1e-3:
        assert math.isclose(found.relative, float(apart / a.double().norm()), rel_tol=1e-6, abs_tol=1e-9)


def test_nothing_is_no_distance() -> None:
    same, zero = Distance(), Distance()
    same.add(torch.ones(3), torch.ones(3))
    zero.add(torch.zeros(3), torch.zeros(3))
    assert (same.relative, same.cosine, zero.relative, zero.cosine) == (0.0, 1.0, 0.0, 1.0)


def test_inspect_lists_what_is_stored(pools: Pools, run: Path) -> None:
    newest = checkpoints(run)[-1]
    found = {one.name: one for one in inspect(newest, numbers=True)}
    held = weights(pools, newest)
    assert {name: one.shape for name, one in found.items()} == {name: value.shape for name, value in held.items()}
    name = "decoder.layers.mlp.linear_fc1.weight"
    assert found[name].blocks == 4 * len(held[name])  # two halves on two ranks, for each layer
    for layer, numbers in found[name].numbers.items():
        assert layer is not None
        assert math.isclose(numbers.deviation, float(held[name][layer].astype(np.float64).std()), rel_tol=1e-9)
    with_state = {one.name for one in inspect(newest, optimizer=True)}
    assert {f"optimizer.state.exp_avg.{name}", f"optimizer.count.exp_avg.{name}"} <= with_state - found.keys()


def test_inspect_names_tensors_with_numbers_that_are_none(pools: Pools, run: Path, tmp_path: Path) -> None:
    name = "decoder.layers.mlp.linear_fc2.weight"
    spoiled = pools(1).run(f"{CASES}:spoiled", checkpoint=str(checkpoints(run)[-1]), out=str(tmp_path / "x"), name=name)
    assert damaged(inspect(Path(spoiled[0]), numbers=True)) == [f"{name} (layer 1): 1"]
    shown = command("convert", "inspect", spoiled[0], "--stats", folder=tmp_path)
    assert shown.status == 1
    assert "linear_fc2" in shown.err


def test_diff_is_zero_between_layouts_and_measures_training(pools: Pools, run: Path, tmp_path: Path) -> None:
    first, last = checkpoints(run)[0], checkpoints(run)[-1]
    found = compare(first, last)
    before, after = weights(pools, first), weights(pools, last)
    for name, distance in found.by_name().items():
        plain = name.replace("layers.*.", "layers.")
        a, b = before[plain].astype(np.float64), after[plain].astype(np.float64)
        assert math.isclose(distance.relative, np.linalg.norm(a - b) / np.linalg.norm(a), rel_tol=1e-6)
        assert distance.relative > 0
    again = made(pools, "reshard", checkpoint=str(last), out=str(tmp_path / "whole"))
    same = compare(last, again)
    assert all(one.relative == 0 and one.equal == one.count for one in same.distances.values())
    assert (same.shapes, same.only_first, same.only_second) == ({}, [], [])


def test_diff_says_what_only_one_has(pools: Pools, run: Path, tmp_path: Path) -> None:
    wide = made(pools, "resize_vocab", checkpoint=str(run), out=str(tmp_path / "wide"), words=600)
    found = compare(checkpoints(run)[-1], wide)
    assert set(found.shapes) == {"embedding.word_embeddings.weight", "output_layer.weight"}
    with pytest.raises(CheckpointError, match="missing"):
        compare(checkpoints(run)[-1], tmp_path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_task_vectors_add_what_was_learned(pools: Pools, run: Path, tmp_path: Path, ranks: int) -> None:
    base, middle, last = checkpoints(run)
    tuned = [(str(middle), 0.5), (str(last), -1.0)]
    sum_of = made(pools, "task_vectors", ranks, base=str(base), tuned=tuned, out=str(tmp_path / "sum"))
    zero, half, minus = (weights(pools, folder) for folder in (base, middle, last))
    for name, found in weights(pools, sum_of).items():
        start, *learned = (each[name].astype(np.float64) for each in (zero, half, minus))
        expected = start + 0.5 * (learned[0] - start) - (learned[1] - start)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    derived = Ledger.read(sum_of).derived
    assert derived is not None
    assert (derived["operation"], derived["weights"]) == ("task-vectors", [1.5, 0.5, -1.0])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_larger_vocabulary_keeps_everything_else(pools: Pools, run: Path, tmp_path: Path, ranks: int) -> None:
    wide = made(pools, "resize_vocab", ranks, checkpoint=str(run), out=str(tmp_path / "wide"), words=600, multiple=64)
    before, after = weights(pools, checkpoints(run)[-1]), weights(pools, wide)
    words = Ledger.read(wide).tokenizer["vocab_size"]
    for name, value in after.items():
        if "word_embeddings" in name or "output_layer" in name:
            assert value.shape[0] == 640
            np.testing.assert_array_equal(value[:words], before[name][:words])
            mean = before[name][:words].astype(np.float64).mean(0)
            np.testing.assert_allclose(value[words:], np.tile(mean, (640 - words, 1)), rtol=1e-6, atol=1e-9)
        else:
            np.testing.assert_array_equal(value, before[name])
    assert Ledger.read(wide).derived == {
        "operation": "resize-vocab", "optimizer": "kept", "of": [Ledger.read(checkpoints(run)[-1]).id],
        "words": [words, 600], "rows": [before["output_layer.weight"].shape[0], 640],
    }  # fmt: skip


def test_a_stage_goes_on_with_a_larger_vocabulary_as_if_it_had_been_so(
    pools: Pools, streams: dict[str, str], run: Path, tmp_path: Path
) -> None:
    """Rates and moments go on: what a stage does to them is the same as without new padding."""
    folders = {"as it was": run, "resized": tmp_path / "padded"}
    made(pools, "resize_vocab", checkpoint=str(run), out=str(folders["resized"]), multiple=16)
    kept = {}
    for name, parent in folders.items():
        config = run_mapping(tmp_path / name.replace(" ", "-"), {"english": streams["english"]}, 2, **TENSOR)
        config["stage"]["name"] = "more"
        run_checkpoint = checkpoints(parent)[-1]
        if name == "resized":
            config["model"] = config["model"] | {
                "vocab_size": Ledger.read(run_checkpoint).model["vocab_size"],
                "vocab_multiple": 16,
            }
        done = Path(pools(2).run(f"{CASES}:make_run", config=config, parent=str(run_checkpoint))[0])
        kept[name] = [json.loads(line)["rate"] for line in (done / "metrics.jsonl").open() if "rate" in line]
        stage = Ledger.read(checkpoints(done)[-1]).stage
        assert stage.carry["first_moment"]["factor"] == 1.0
    assert kept["as it was"] == kept["resized"]


def test_fewer_rows_than_words_are_refused(pools: Pools, run: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "small")
    kind, text = refused(pools, "resize_vocab", checkpoint=str(run), out=out, words=10)
    assert (kind, "words of the tokenizer" in text) == ("ConfigError", True)
    kind, text = refused(pools, "resize_vocab", checkpoint=str(run), out=out)
    assert (kind, "--vocab-size" in text) == ("ConfigError", True)
    assert not Path(out).exists()


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (2, 4)])
def test_a_run_cut_anew_is_the_same_run(pools: Pools, run: Path, tmp_path: Path, ranks: int, tensor: int) -> None:
    folder = made(pools, "reshard", ranks, checkpoint=str(run), out=str(tmp_path / "cut"), tensor=tensor)
    newest = checkpoints(run)[-1]
    assert Ledger.read(folder) == Ledger.read(newest)
    assert Ledger.read_file(tmp_path / "cut" / "start.json") == Ledger.read_file(run / "start.json")
    blocks = {one.name: one.blocks for one in inspect(folder, optimizer=True)}
    layers = len(weights(pools, newest)["decoder.layers.mlp.linear_fc2.weight"])
    assert blocks["decoder.layers.mlp.linear_fc2.weight"] == layers * tensor
    assert blocks["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"] == layers * tensor * 2
    assert blocks["optimizer.count.exp_avg.decoder.layers.mlp.linear_fc1.weight"] == layers
    everything = pools(1).run(f"{CASES}:whole_state", checkpoints=[str(newest), str(folder)])[0]
    assert everything == []


def test_a_run_cut_anew_resumes_bitwise(pools: Pools, streams: dict[str, str], run: Path, tmp_path: Path) -> None:
    """The checkpoint after 4 steps, cut anew, goes on to the 6 steps of the run."""
    shutil.copytree(run, tmp_path / "run")
    middle = checkpoints(tmp_path / "run")[1]
    folder = made(pools, "reshard", checkpoint=str(middle), out=str(tmp_path / "cut"), tensor=2)
    assert folder.name == middle.name
    config = run_mapping(tmp_path / "cut", {"english": streams["english"]}, **TENSOR)
    pools(2).run(f"{CASES}:make_run", config=config)
    ours, theirs = (weights(pools, checkpoints(each)[-1]) for each in (tmp_path / "cut", run))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


def test_ranks_that_do_not_divide_the_model_are_refused(pools: Pools, run: Path, tmp_path: Path) -> None:
    kind, text = refused(pools, "reshard", checkpoint=str(run), out=str(tmp_path / "x"), tensor=7)
    assert kind == "ConfigError"
    assert "--tensor 7 does not divide" in text
    assert not (tmp_path / "x").exists()


def test_commands_show_what_they_found(run: Path, tmp_path: Path) -> None:
    first, last = checkpoints(run)[0], checkpoints(run)[-1]
    shown = command("convert", "inspect", str(run), "--stats", "--json", str(tmp_path / "i.json"), folder=tmp_path)
    assert shown.status == 0, shown.err
    assert "layers.mlp.linear_fc1" in shown.out
    tensors = json.loads((tmp_path / "i.json").read_text())["tensors"]
    assert all(one["numbers"] for one in tensors)
    shown = command("convert", "diff", str(first), str(last), "--json", str(tmp_path / "d.json"), folder=tmp_path)
    assert shown.status == 0, shown.err
    found = json.loads((tmp_path / "d.json").read_text())
    assert {one["tensor"] for one in found["tensors"]} >= {"output_layer.weight"}
    wrong = command(
        "convert", "task-vector", str(run), "--add", f"{first}:much", "--out", str(tmp_path / "t"), folder=tmp_path
    )
    assert wrong.status == 2
    assert "'much' is no number" in wrong.err
    assert ModelConfig.model_validate(Ledger.read(last).model).layers == len(
        {one["layer"] for one in found["tensors"]} - {None}
    )
