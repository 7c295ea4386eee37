from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megacpt.data.stream import StreamMeta, TokenStream
from megacpt.data.tokenizer import load_tokenizer
from megacpt.errors import DataError
from tests.data.conftest import MakeStream

TEXTS = ["one", "two → and more", "三"]


def test_it_gives_back_the_documents(make_stream: MakeStream) -> None:
    stream, tokenizer = make_stream(TEXTS), load_tokenizer("bytes")
    documents = [stream.document(i) for i in range(stream.documents)]
    assert [tokenizer.decode(document) for document in documents] == TEXTS
    assert all(document[-1] == tokenizer.eod for document in documents)
    assert stream.read(0, stream.tokens).tolist() == np.concatenate(documents).tolist()
    assert stream.read(2, 3).dtype == np.int64


def test_its_description_counts_what_is_there(make_stream: MakeStream) -> None:
    meta = make_stream(TEXTS, "words").meta
    size = sum(len(text.encode()) for text in TEXTS)
    assert (meta.name, meta.tokenizer, meta.vocab_size, meta.eod) == ("words", "bytes", 257, 256)
    assert (meta.documents, meta.bytes, meta.tokens, meta.dtype) == (3, size, size + 3, "uint16")
    assert meta.tokenizer_fingerprint == load_tokenizer("bytes").fingerprint


def test_megatron_reads_it(make_stream: MakeStream) -> None:
    stream = make_stream(TEXTS)
    theirs = IndexedDataset(str(stream.folder / stream.meta.files), mmap=True)
    assert len(theirs) == stream.documents
    assert all((theirs[i] == stream.document(i)).all() for i in range(len(theirs)))


def test_it_can_be_moved_and_renamed(make_stream: MakeStream, tmp_path: Path) -> None:
    stream = make_stream(TEXTS)
    shutil.move(stream.folder, tmp_path / "elsewhere")
    assert TokenStream.open(tmp_path / "elsewhere", verify="full").tokens == stream.tokens


def test_the_content_hash_is_that_of_the_content(make_stream: MakeStream) -> None:
    same, other, split = (
        make_stream(["ab", "c"], "a"),
        make_stream(["ab", "d"], "b"),
        make_stream(["a", "bc"], "c"),
    )
    assert make_stream(["ab", "c"], "d").meta.content_hash == same.meta.content_hash
    assert len({stream.meta.content_hash for stream in (same, other, split)}) == 3


def test_a_truncated_bin_is_named_with_both_sizes(make_stream: MakeStream) -> None:
    stream = make_stream(TEXTS)
    path = stream.folder / "stream.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError) as caught:
        TokenStream.open(stream.folder)
    assert f"{path} has {size - 7} bytes, but its index says {size}" in str(caught.value)


def test_changed_content_is_found_by_full_verification_only(make_stream: MakeStream) -> None:
    stream = make_stream(TEXTS)
    path = stream.folder / "stream.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    assert TokenStream.open(stream.folder).tokens == stream.tokens
    with pytest.raises(DataError, match=r"the content of .*stream.bin \(or its .idx\) has changed"):
        TokenStream.open(stream.folder, verify="full")


def test_files_of_another_stream_are_found(make_stream: MakeStream) -> None:
    first, second = make_stream(["aaa"], "first"), make_stream(["bbbbb"], "second")
    for suffix in ("bin", "idx"):
        shutil.copy(second.folder / f"second.{suffix}", first.folder / f"first.{suffix}")
    with pytest.raises(DataError, match=r"says tokens 4, but .*first.bin has 6"):
        TokenStream.open(first.folder)


def test_another_tokenizer_is_refused_with_both_names(make_stream: MakeStream, sentencepiece_folder: Path) -> None:
    stream, other = make_stream(TEXTS), load_tokenizer(sentencepiece_folder)
    TokenStream.open(stream.folder, tokenizer=load_tokenizer("bytes"))
    with pytest.raises(DataError) as caught:
        TokenStream.open(stream.folder, tokenizer=other)
    for part in ("bytes", other.spec, other.fingerprint[:12], stream.meta.tokenizer_fingerprint[:12]):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("eod"), r"lacks or has too many keys \(eod\)"),
        (lambda content: content.update(extra=1), r"lacks or has too many keys \(extra\)"),
        (lambda content: content.update(format=9), "not a stream description of format 1"),
    ],
)
def test_descriptions_of_another_form_are_refused(make_stream: MakeStream, change, message: str) -> None:
    stream = make_stream(TEXTS)
    path = stream.folder / "stream.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        TokenStream.open(stream.folder)


def test_a_description_that_is_no_json_is_refused(make_stream: MakeStream) -> None:
    stream = make_stream(TEXTS)
    (stream.folder / "stream.json").write_text("{")
    with pytest.raises(DataError, match=r"stream.json is not JSON"):
        StreamMeta.read(stream.folder)


def test_places_without_a_stream_say_what_is_there_instead(make_stream: MakeStream, tmp_path: Path) -> None:
    stream = make_stream(TEXTS, "english")
    with pytest.raises(DataError, match=r"there is no token stream .*; did you mean 'english'"):
        TokenStream.open(tmp_path / "englsh")
    with pytest.raises(DataError, match=r"is no token stream: it has no stream.json"):
        TokenStream.open(tmp_path)
    with pytest.raises(DataError, match=r"megacpt data adopt .*english --tokenizer"):
        TokenStream.open(stream.folder / "english")
    (tmp_path / "begun.partial").mkdir()
    with pytest.raises(DataError, match=r"begun is not finished: run its 'megacpt data prepare' command again"):
        TokenStream.open(tmp_path / "begun")
