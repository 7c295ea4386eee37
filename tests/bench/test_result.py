"""Results as JSON, ratios with their noise, and comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from megacpt.bench.compare import compare
from megacpt.bench.machine import Machine, this_machine
from megacpt.bench.result import BenchResult, Series, ratio, read_result
from megacpt.cli.bench import app
from megacpt.errors import DataError


def series(mean: float, seed: int, noise: float = 0.02) -> Series:
    draw = np.random.default_rng(seed)
    return Series(blocks=(mean * (1 + noise * draw.random((12, 5)))).tolist())


def result(bench: str = "step", layers: int = 2, **times: Series) -> BenchResult:
    machine = Machine(
        device="a CPU", cores=2, threads=2, load=0.1, kernels="built", versions={"torch": "2"}, commit="c"
    )
    return BenchResult(bench=bench, machine=machine, config={"model": {"layers": layers}}, series=times)


def test_a_difference_above_the_noise_is_seen() -> None:
    found = ratio(series(1.1, 1), series(1.0, 2), paired=False)
    assert found.value == pytest.approx(1.1, rel=0.01)
    assert found.certain
    assert found.high - found.low < 0.02


def test_a_difference_within_the_noise_is_not() -> None:
    assert not ratio(series(1.0, 1, noise=0.5), series(1.01, 2, noise=0.5), paired=False).certain


def test_pairing_removes_what_hits_both() -> None:
    drift = np.repeat(np.linspace(1.0, 3.0, 12), 5).reshape(12, 5)
    ours, theirs = (Series(blocks=(drift * np.asarray(series(m, s).blocks)).tolist()) for m, s in ((1.1, 1), (1.0, 2)))
    paired, unpaired = ratio(ours, theirs, paired=True), ratio(ours, theirs, paired=False)
    assert paired.certain
    assert not unpaired.certain
    assert paired.value == unpaired.value


def test_comparison() -> None:
    before = result(step=series(1.0, 1), other=series(1.0, 2, 0.5), gone=series(1.0, 3))
    after = result(layers=3, step=series(0.8, 4), other=series(1.0, 5, 0.5))
    found = compare(before, after)
    assert [(change.name, change.verdict) for change in found.changes] == [
        ("step", "faster"),
        ("other", "within noise"),
    ]
    assert found.differences == [("model.layers", "2", "3")]
    assert compare(after, before).changes[0].verdict == "slower"


def test_results_that_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="different benchmarks"):
        compare(result(step=series(1, 1)), result("data", step=series(1, 1)))
    with pytest.raises(DataError, match="share no series"):
        compare(result(a=series(1, 1)), result(b=series(1, 1)))


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    made = result(step=series(1.0, 1)).model_copy(
        update={
            "machine": this_machine(),
            "figures": {"ratio": ratio(series(1, 1), series(1, 2), paired=True), "n": 3.0},
        }
    )
    made.write(tmp_path / "a.json")
    assert read_result(tmp_path / "a.json") == made
    assert {"torch", "megatron-core", "python", "megacpt"} <= made.machine.versions.keys()


@pytest.mark.parametrize("content", ["", "[1]", '{"format": 1}', '{"format": 2}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match="not a result"):
        read_result(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_result(tmp_path / "missing.json")


def test_the_command_shows_a_comparison(tmp_path: Path) -> None:
    files: list[Any] = [tmp_path / "a.json", tmp_path / "b.json"]
    result(step=series(1.0, 1)).write(files[0])
    result(layers=7, step=series(2.0, 1)).write(files[1])
    shown = CliRunner().invoke(app, ["compare", *map(str, files)])
    assert shown.exit_code == 0
    assert "slower" in shown.output
    assert "model.layers" in shown.output
    assert json.loads(files[0].read_text())["bench"] == "step"
