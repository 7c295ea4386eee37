from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.tokenizer import load_tokenizer, token_dtype
from megacpt.errors import DataError, SetupError
from tests.data.conftest import TEXT

unicode_text = st.text(st.characters(exclude_categories=["Cs"]))


@given(unicode_text)
def test_bytes_give_text_back(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert bytes(ids.tolist()) == text.encode()
    assert tokenizer.decode(ids) == text


def test_bytes_have_one_more_id_that_ends_documents() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.spec) == (257, 256, "bytes")
    assert tokenizer.decode([104, 105, 256, 33]) == "hi!"
    assert tokenizer.decode([0xE6, 0xBC]) == "\ufffd"


@pytest.mark.parametrize("spec", ["folder", "file"])
def test_sentencepiece_gives_text_back(sentencepiece_folder: Path, spec: str) -> None:
    path = sentencepiece_folder if spec == "folder" else sentencepiece_folder / "tokenizer.model"
    tokenizer = load_tokenizer(path)
    text = f"  {TEXT}\r\n\x00 </s> unseen: ᚠ"
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size == 340
    assert len(ids) < len(text.encode())
    assert tokenizer.eod not in ids
    assert tokenizer.decode(np.append(ids, tokenizer.eod)) == text


def test_hugging_face_gives_text_back_and_ignores_truncation_and_padding(hf_folder: Path) -> None:
    tokenizer = load_tokenizer(hf_folder)
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 16
    assert tokenizer.decode(np.append(ids, tokenizer.eod)) == TEXT


def test_special_tokens_spelled_in_text_stay_text(hf_folder: Path) -> None:
    tokenizer = load_tokenizer(hf_folder)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


@pytest.mark.parametrize("declared", ["<|end|>", {"content": "<|end|>", "special": True}])
def test_the_declared_eos_token_ends_documents(tmp_path: Path, hf_folder: Path, declared: object) -> None:
    by_name = load_tokenizer(hf_folder)
    assert by_name.eod == 1
    shutil.copy(hf_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": declared}))
    by_config = load_tokenizer(tmp_path)
    assert by_config.eod == 2
    assert by_config.fingerprint != by_name.fingerprint


def test_fingerprints_follow_the_content_not_the_place_or_the_spelling(tmp_path: Path, hf_folder: Path) -> None:
    original = load_tokenizer(hf_folder)
    content = json.loads((hf_folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(reversed(content.items())), indent=7))
    assert load_tokenizer(tmp_path).fingerprint == original.fingerprint
    content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).fingerprint != original.fingerprint


def test_fingerprints_tell_kinds_apart(sentencepiece_folder: Path, hf_folder: Path) -> None:
    fingerprints = {load_tokenizer(spec).fingerprint for spec in ("bytes", sentencepiece_folder, hf_folder)}
    assert len(fingerprints) == 3


def test_a_tokenizer_without_end_token_is_refused(tmp_path: Path, hf_folder: Path) -> None:
    content = json.loads((hf_folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] == "<pad>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"no end-of-sequence token.*special tokens: <pad>"):
        load_tokenizer(tmp_path)


def test_an_eos_token_that_does_not_exist_is_refused(tmp_path: Path, hf_folder: Path) -> None:
    shutil.copy(hf_folder / "tokenizer.json", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<gone>"}')
    with pytest.raises(DataError, match=r"special_tokens_map.json names the eos_token '<gone>'"):
        load_tokenizer(tmp_path)


def test_a_missing_package_says_how_to_get_it(hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SetupError, match=r"pip install 'megacpt\[hf\]'"):
        load_tokenizer(hf_folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"no model", "is not a SentencePiece model"),
        ("tokenizer.json", b"{no json", "is not JSON"),
        ("tokenizer.json", b"[]", "should hold a JSON object, not a list"),
        ("tokenizer.json", b'{"model": 3}', "is not a Hugging Face tokenizer"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_places_without_a_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither a tokenizer.json nor a tokenizer.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"there is no tokenizer 'byte': write 'bytes'"):
        load_tokenizer("byte")


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(DataError, match="id 300 is outside the vocabulary of tokenizer bytes"):
        load_tokenizer("bytes").decode([65, 300])


def test_ids_are_stored_as_megatron_stores_them() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for size in (257, 65499, 65500, 200_000):
        assert token_dtype(size) == DType.optimal_dtype(size)
