from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from megacpt.data import inspect as module
from megacpt.data.adopt import adopt
from megacpt.data.indexed import IndexedWriter
from megacpt.data.inspect import glance
from megacpt.data.stream import TokenStream
from megacpt.data.tokenizer import load_tokenizer
from megacpt.errors import DataError
from tests.data.conftest import MakeStream
from tests.data.test_indexed import write_with_megatron

TEXTS = ["zero", "one is longer", "two ü", "three"]


@pytest.fixture
def megatron_prefix(tmp_path: Path) -> Path:
    """Files that Megatron wrote from TEXTS, the last document without an end."""
    tokenizer = load_tokenizer("bytes")
    documents = [[[*tokenizer.encode(text), tokenizer.eod]] for text in TEXTS]
    documents[-1][0].pop()
    prefix = tmp_path / "corpus_text_document"
    write_with_megatron(prefix, documents)
    return prefix


def test_a_glance_shows_the_description_lengths_and_texts(make_stream: MakeStream) -> None:
    stream = make_stream(TEXTS)
    found = glance(stream.folder, documents=3)
    assert found.meta == stream.meta
    assert found.texts == TEXTS[:3]
    assert found.notes == []
    assert (found.documents, found.tokens, found.dtype) == (4, stream.tokens, "uint16")
    lengths = [len(text.encode()) + 1 for text in TEXTS]
    assert found.lengths["minimum"] == min(lengths)
    assert found.lengths["maximum"] == max(lengths)
    assert found.lengths["mean"] == np.mean(lengths)


def test_long_documents_are_shown_from_their_beginning(make_stream: MakeStream) -> None:
    stream = make_stream(["ab" * 1000])
    assert glance(stream.folder, characters=7).texts == ["abababa"]


def test_lengths_of_many_documents_are_sampled(make_stream: MakeStream, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make_stream(["x" * (i % 10) + "." for i in range(500)])
    monkeypatch.setattr(module, "LENGTH_SAMPLE", 50)
    found = glance(stream.folder)
    assert found.notes == ["the lengths are those of 50 evenly spaced documents"]
    assert 2 <= found.lengths["minimum"] <= found.lengths["maximum"] <= 11


def test_without_its_tokenizer_ids_are_shown(make_stream: MakeStream, tmp_path: Path, sentencepiece_folder) -> None:
    shutil.copytree(sentencepiece_folder, tmp_path / "tok")
    stream = make_stream(TEXTS, tokenizer=str(tmp_path / "tok"))
    (tmp_path / "tok" / "tokenizer.model").unlink()
    found = glance(stream.folder, documents=1)
    assert found.texts == [" ".join(str(i) for i in stream.document(0))]
    assert "the documents are shown as ids: there is no tokenizer" in found.notes[0]
    assert glance(stream.folder, tokenizer=sentencepiece_folder, documents=1).texts == TEXTS[:1]
    with pytest.raises(DataError, match="is not the one of the stream"):
        glance(stream.folder, tokenizer="bytes")


def test_megatron_files_say_what_is_missing(megatron_prefix: Path) -> None:
    for path in (megatron_prefix, megatron_prefix.with_name(f"{megatron_prefix.name}.idx")):
        found = glance(path, documents=1)
        assert found.meta is None
        assert found.documents == 4
        assert found.texts == ["122 101 114 111 256"]
        assert "what made them is not known" in found.notes[0]
        assert f"megacpt data adopt {megatron_prefix} --tokenizer" in found.notes[0]
    assert glance(megatron_prefix, tokenizer="bytes", documents=2).texts == TEXTS[:2]


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no token stream"):
        glance(tmp_path / "none")


@pytest.mark.parametrize("out", [None, "streams/adopted"])
def test_adopted_files_are_a_stream_and_stay_as_they_are(
    megatron_prefix: Path, tmp_path: Path, out: str | None
) -> None:
    before = megatron_prefix.with_name(f"{megatron_prefix.name}.bin").read_bytes()
    meta = adopt(megatron_prefix, "bytes", out and tmp_path / out, progress=False)
    stream = TokenStream.open(tmp_path / out if out else megatron_prefix, verify="full")
    tokenizer = load_tokenizer("bytes")
    assert [tokenizer.decode(stream.document(i)) for i in range(4)] == TEXTS
    assert stream.meta == meta
    assert meta.bytes == sum(len(text.encode()) for text in TEXTS)
    assert meta.settings == {"adopted": True, "documents_with_end": 3}
    assert megatron_prefix.with_name(f"{megatron_prefix.name}.bin").read_bytes() == before


def test_adopted_files_and_their_description_can_move_together(megatron_prefix: Path, tmp_path: Path) -> None:
    adopt(megatron_prefix, "bytes", progress=False)
    (tmp_path / "moved").mkdir()
    for path in tmp_path.glob("corpus*"):
        shutil.move(path, tmp_path / "moved" / path.name)
    assert TokenStream.open(tmp_path / "moved" / megatron_prefix.name).documents == 4


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.dtype(np.uint16)) as writer:
        writer.add(np.array([1, 2]))
        writer.add(np.array([3, 300]))
        writer.finish()
    with pytest.raises(DataError, match=r"document 1 has id 300, but the vocabulary of bytes ends at 256"):
        adopt(tmp_path / "x", "bytes", progress=False)
    assert not (tmp_path / "x").exists()


def test_a_stream_is_not_adopted_over(make_stream: MakeStream, megatron_prefix: Path) -> None:
    stream = make_stream(TEXTS)
    with pytest.raises(DataError, match="exists and is a stream or a file"):
        adopt(megatron_prefix, "bytes", stream.folder, progress=False)
