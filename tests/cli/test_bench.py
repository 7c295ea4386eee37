"""``megacpt bench step`` and what it leaves for ``megacpt bench compare``."""

from __future__ import annotations

from pathlib import Path

from megacpt.bench.result import read_result
from tests.cli.command import megacpt

SMALL = (
    "--model",
    "tiny",
    "model.layers=2",
    "batch.sequences=2",
    "batch.seq_length=16",
    "batch.microbatch=1",
)


def test_step_prints_and_writes_what_compare_reads(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        found = megacpt("bench", "step", *SMALL, "--blocks", "2", "--json", name, folder=tmp_path)
        assert found.status == 0, found.err
    assert "engine / plain" in found.out
    assert "tokens/s" in found.out
    assert read_result(tmp_path / "a.json").config["batch"]["seq_length"] == 16
    compared = megacpt("bench", "compare", "a.json", "b.json", folder=tmp_path)
    assert compared.status == 0, compared.err
    assert "B / A" in compared.out


def test_mistakes_end_with_status_2(tmp_path: Path) -> None:
    for arguments, word in (
        (("step", "--model", "tinny"), "did you mean 'tiny'"),
        (("step", "parallel.tensor=2"), "set parallel.tensor=1"),
        (("compare", "no.json", "no.json"), "cannot be read"),
    ):
        found = megacpt("bench", *arguments, folder=tmp_path)
        assert found.status == 2
        assert word in found.err
        assert "Traceback" not in found.err
