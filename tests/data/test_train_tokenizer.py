from __future__ import annotations

import random
from pathlib import Path

import pytest

from megacpt.data.tokenizer import load_tokenizer
from megacpt.data.train_tokenizer import train_tokenizer
from megacpt.errors import DataError
from tests.data.conftest import TEXT, write_jsonl


def test_it_trains_on_the_named_field_and_learns_long_lines(tmp_path: Path) -> None:
    # One line far longer than SentencePiece takes at a time.
    write_jsonl(tmp_path / "a.jsonl", ["continual pre-training " * 5000], field="body")
    trained = train_tokenizer([tmp_path / "a.jsonl"], 300, tmp_path / "tok", field="body")
    assert trained.vocab_size == 300
    assert len(trained.encode("continual pre-training")) <= 6
    assert trained.fingerprint == load_tokenizer(tmp_path / "tok").fingerprint


def test_the_same_text_gives_the_same_tokenizer(tmp_path: Path) -> None:
    words = random.Random(0).choices(["sea", "wind", "stone", "river", "cloud"], k=2000)
    (tmp_path / "a.txt").write_text(" ".join(words))
    first, second = (train_tokenizer([tmp_path / "a.txt"], 300, tmp_path / name) for name in ("x", "y"))
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    ("size", "message"), [(100_000, r"more than this text can fill \(\d+\)"), (50, r"alone need \d+")]
)
def test_sizes_that_the_text_cannot_have_are_explained(tmp_path: Path, size: int, message: str) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(DataError, match=message):
        train_tokenizer([tmp_path / "a.txt"], size, tmp_path / "tok")
    assert not (tmp_path / "tok").exists()


def test_an_existing_tokenizer_is_kept(tmp_path: Path, sentencepiece_folder: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(DataError, match=r"tokenizer.model exists: choose another --out"):
        train_tokenizer([tmp_path / "a.txt"], 300, sentencepiece_folder)
