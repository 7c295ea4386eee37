"""The benchmark of conversions: real files, three sides in turns, and refusals before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from megacpt.bench.result import read_result
from tests.cli.command import megacpt

MODEL = "{layers: 1, hidden: 64, ffn: 96, heads: 4, vocab_size: 512, max_seq_length: 64}"


def test_all_sides_move_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(MODEL)
    arguments = ("--model", "model.yaml", "--layers", "3", "--blocks", "2", "--folder", ".", "--json", "found.json")
    shown = megacpt("bench", "convert", *arguments, folder=tmp_path)
    assert shown.status == 0, shown.err
    assert "from-hf" in shown.out
    found = read_result(tmp_path / "found.json")
    assert set(found.series) == {"copy", "from-hf", "to-hf"}
    assert {series.work for series in found.series.values()} == {2.0 * found.config["parameters"]}
    assert found.config["largest"] == 512 * 64 * 2
    for name in ("from-hf / copy", "to-hf / copy"):
        share = found.figures[name]
        assert not isinstance(share, float)
        copied, converted = (found.series[side].median for side in ("copy", name.split(" ")[0]))
        assert share.value == pytest.approx(copied / converted)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [("vocab_size: 512, ", "vocabulary"), ("hidden: 64", "activation")],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, changes: str, said: str) -> None:
    text = MODEL.replace(changes, "hidden: 64, activation: gelu" if said == "activation" else "")
    (tmp_path / "model.yaml").write_text(text)
    shown = megacpt("bench", "convert", "--model", "model.yaml", "--folder", ".", folder=tmp_path)
    assert shown.status == 2
    assert said in shown.err
