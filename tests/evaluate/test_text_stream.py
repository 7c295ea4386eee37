"""Streamed text equals decoded text, and shows no half characters on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.tokenizer import Tokenizer, load_tokenizer
from megacpt.data.train_tokenizer import train_tokenizer
from megacpt.evaluate.text_stream import TextStream

TEXT = "The quick brown fox, 12 € and 世界, jumps over the lazy dog; naïve façade 🙂 again.\n"
BYTES = load_tokenizer("bytes")


def stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    text = TextStream(tokenizer, prompt)
    return [*(text.add(token) for token in ids), text.end()]


@given(st.text(max_size=40), st.text(max_size=100))
def test_text_in_bytes_comes_character_by_character(before: str, text: str) -> None:
    ids = [int(i) for i in BYTES.encode(text)]
    pieces = stream(BYTES, [int(i) for i in BYTES.encode(before)], ids)
    assert "".join(pieces) == text
    unknown = "\ufffd"
    if unknown not in text:
        assert not any(unknown in piece for piece in pieces)
        assert pieces[-1] == ""


@given(st.lists(st.integers(0, 256), max_size=200))
def test_any_bytes_come_out_as_decoded_at_once(ids: list[int]) -> None:
    pieces = stream(BYTES, [], ids)
    assert "".join(pieces) == BYTES.decode(ids)


def test_broken_bytes_are_not_held_back_for_ever() -> None:
    text = TextStream(BYTES)
    shown = "".join(text.add(0x80) for _ in range(50))
    assert len(shown) >= 47


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog again and again.\n" * 50)
    return train_tokenizer([folder / "text.txt"], 300, Path(folder / "out"))


@pytest.mark.parametrize("cut", [0, 3, 9, 40])
def test_sentencepiece_keeps_spaces_and_joins_byte_pieces(pieces: Tokenizer, cut: int) -> None:
    ids = [int(i) for i in pieces.encode(TEXT * 3)]
    whole = pieces.decode(ids)
    before = pieces.decode(ids[:cut])
    said = stream(pieces, ids[:cut], ids[cut:])
    if "\ufffd" not in before:
        assert before + "".join(said) == whole
    assert not any("\ufffd" in piece for piece in said[3:])
