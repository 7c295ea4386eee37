"""``megacpt generate`` on a small trained run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megacpt.config import dump
from tests.cli.command import megacpt
from tests.small import make_stream, run_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    config = run_config(folder / "run", {"english": str(make_stream(folder, "english"))}, steps=4)
    (folder / "run.yaml").write_text(dump(config))
    trained = megacpt("train", "run.yaml", folder=folder)
    assert trained.status == 0, trained.err
    return folder / "run"


def test_it_continues_the_prompt(run: Path, tmp_path: Path) -> None:
    options = (
        "--prompt",
        "the ship ",
        "--max-tokens",
        "12",
        "--temperature",
        "0.9",
        "--top-k",
        "60",
        "--seed",
        "4",
    )
    first = megacpt("generate", run, *options, folder=tmp_path)
    assert first.status == 0, first.err
    assert first.out.startswith("the ship ")
    assert len(first.out) > len("the ship ")
    assert "tokens/s" in first.err
    assert megacpt("generate", run, *options, folder=tmp_path).out == first.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "x" * 64), ("64 tokens", "model.max_seq_length")),
        (("--prompt", "x", "--top-p", "2"), ("top-p 2",)),
        (("--prompt", "x\udcff"), ("not UTF-8",)),
    ],
)
def test_mistakes_end_with_status_2(
    run: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    found = megacpt("generate", run, *options, folder=tmp_path)
    assert found.status == 2
    assert all(word in found.err for word in words)
    assert "Traceback" not in found.err
