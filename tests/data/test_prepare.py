from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megacpt.data import indexed
from megacpt.data import prepare as module
from megacpt.data.prepare import prepare
from megacpt.data.stream import StreamMeta, TokenStream
from megacpt.data.tokenizer import load_tokenizer
from megacpt.errors import DataError
from tests.data.conftest import write_jsonl

TEXTS = [f"document {i}: " + "word " * (i % 23) for i in range(300)]


def run(source: Path, out: Path, **settings) -> StreamMeta:
    settings = {"workers": 1, "progress": False, "shard_bytes": 2000, **settings}
    return prepare([source], settings.pop("tokenizer", "bytes"), out, **settings)


def texts_of(folder: Path, tokenizer: str | Path = "bytes") -> list[str]:
    stream = TokenStream.open(folder, verify="full")
    return [load_tokenizer(tokenizer).decode(stream.document(i)) for i in range(stream.documents)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "source.jsonl", TEXTS)
    return tmp_path / "source.jsonl"


def test_every_document_is_there_once_and_in_order(source: Path, tmp_path: Path) -> None:
    meta = run(source, tmp_path / "out")
    assert texts_of(tmp_path / "out") == TEXTS
    assert meta.documents == len(TEXTS)
    assert meta.bytes == sum(len(text.encode()) for text in TEXTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source.jsonl"]


def test_megatron_reads_every_document(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    theirs, tokenizer = IndexedDataset(str(tmp_path / "out" / "out"), mmap=True), load_tokenizer("bytes")
    assert len(theirs) == len(TEXTS)
    for i, text in enumerate(TEXTS):
        assert theirs[i].tolist() == [*tokenizer.encode(text), tokenizer.eod]


def test_any_number_of_workers_and_any_cut_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    hashes = set()
    for name, workers, shard_bytes in (("a", 1, 2000), ("b", 3, 2000), ("c", 2, 777), ("d", 1, 1 << 26)):
        meta = run(source, tmp_path / name, workers=workers, shard_bytes=shard_bytes, holdout=0.1)
        hashes.add((meta.content_hash, StreamMeta.read(tmp_path / f"{name}-valid").content_hash))
    assert len(hashes) == 1


def test_kinds_of_input_can_be_mixed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.txt").write_text("from text")
    write_jsonl(tmp_path / "in" / "a.jsonl", ["from lines"])
    prepare([source, tmp_path / "in"], "bytes", tmp_path / "out", workers=1, progress=False)
    assert texts_of(tmp_path / "out") == [*TEXTS, "from lines", "from text"]


@pytest.mark.parametrize("kind", ["sentencepiece_folder", "hf_folder"])
def test_other_tokenizers_work_in_workers_too(
    source: Path, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    meta = run(source, tmp_path / "out", tokenizer=folder, workers=2, shard_bytes=9000)
    assert texts_of(tmp_path / "out", folder) == TEXTS
    assert meta.tokenizer_fingerprint == load_tokenizer(folder).fingerprint


def test_documents_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", "", "two", ""])
    meta = run(tmp_path / "a.jsonl", tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["one", "two"]
    assert meta.settings["empty_documents"] == 2


def test_input_without_any_text_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(DataError, match="no document is left"):
        run(tmp_path / "a.jsonl", tmp_path / "out")


def test_the_holdout_is_a_share_of_whole_documents_and_nothing_is_lost(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(5000)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    run(tmp_path / "a.jsonl", tmp_path / "out", holdout=0.02, shard_bytes=1 << 20)
    kept, held = texts_of(tmp_path / "out"), texts_of(tmp_path / "out-valid")
    assert sorted(kept + held) == sorted(texts)
    assert 60 <= len(held) <= 140
    assert TokenStream.open(tmp_path / "out-valid").meta.settings["split"] == "valid"


def test_copies_of_a_document_are_never_on_both_sides(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"document {i % 50}" for i in range(500)])
    run(tmp_path / "a.jsonl", tmp_path / "out", holdout=0.3)
    kept, held = set(texts_of(tmp_path / "out")), set(texts_of(tmp_path / "out-valid"))
    assert kept
    assert held
    assert not kept & held


def test_a_holdout_that_takes_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the only document")
    with pytest.raises(DataError, match=r"holdout 0.01 takes whole documents, and of the few .* it took none"):
        run(tmp_path / "a.txt", tmp_path / "out", holdout=0.01)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"holdout": 1.0}, "holdout must be a share"), ({"workers": 0}, "workers must be at least 1")],
)
def test_impossible_settings_are_refused(source: Path, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(source, tmp_path / "out", **settings)


def test_the_same_job_again_returns_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(source, tmp_path / "out", holdout=0.1)
    monkeypatch.setattr(module, "make_parts", None)
    assert run(source, tmp_path / "out", holdout=0.1, workers=2) == first


def test_what_a_kill_at_the_very_end_left_behind_is_cleared(source: Path, tmp_path: Path) -> None:
    first = run(source, tmp_path / "out")
    (tmp_path / "out.partial" / "parts").mkdir(parents=True)
    assert run(source, tmp_path / "out") == first
    assert not (tmp_path / "out.partial").exists()


def test_another_job_into_the_same_stream_is_refused_and_explained(
    source: Path, tmp_path: Path, sentencepiece_folder: Path
) -> None:
    run(source, tmp_path / "out")
    for settings, message in [
        ({"tokenizer": sentencepiece_folder}, r"the tokenizer was bytes \(.*\) and is now .*tokenizer.model"),
        ({"field": "id"}, "field was 'text' and is now 'id'"),
        ({"holdout": 0.5}, "holdout was 0.0 and is now 0.5"),
    ]:
        with pytest.raises(DataError, match=message):
            run(source, tmp_path / "out", **settings)
    with source.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataError, match=r"source.jsonl has changed from 1 files and [\d,]+ bytes to"):
        run(source, tmp_path / "out")
    assert texts_of(tmp_path / "out") == TEXTS


def test_other_inputs_into_the_same_stream_are_explained(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    (tmp_path / "more.txt").write_text("more")
    both = [source, tmp_path / "more.txt"]
    with pytest.raises(DataError, match=r"the input .*more.txt was not given before"):
        prepare(both, "bytes", tmp_path / "out", progress=False)
    prepare(both, "bytes", tmp_path / "two", workers=1, progress=False)
    with pytest.raises(DataError, match=r"the input .*more.txt is no longer given"):
        run(source, tmp_path / "two")
    with pytest.raises(DataError, match="the inputs have changed their order"):
        prepare(both[::-1], "bytes", tmp_path / "two", progress=False)
    os.utime(source, ns=(0, 1))
    with pytest.raises(DataError, match=r"has changed \(a name or a modification time\)"):
        prepare(both, "bytes", tmp_path / "two", progress=False)


def test_a_folder_that_is_no_stream_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run(source, tmp_path / "out").documents == len(TEXTS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"other exists and is no token stream"):
        run(source, tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("workers", [1, 2])
def test_after_a_bad_line_is_mended_only_its_part_is_made_again(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        write_jsonl(folder / f"{i}.jsonl", [f"{i}/{j}" + "." * 500 for j in range(5)])
    good, shard_bytes = (folder / "3.jsonl").read_text(), (folder / "3.jsonl").stat().st_size
    (folder / "3.jsonl").write_text(good[:-2] + "!\n")
    with pytest.raises(DataError, match=r"3.jsonl, line 5: this is not JSON"):
        run(folder, tmp_path / "out", workers=workers, shard_bytes=shard_bytes)
    kept = len(list((tmp_path / "out.partial" / "parts").glob("*.json")))
    (folder / "3.jsonl").write_text(good)
    made: list[object] = []
    original = module.make_parts
    monkeypatch.setattr(module, "make_parts", lambda shards, *rest: (made.extend(shards), original(shards, *rest)))
    with caplog.at_level(logging.WARNING):
        meta = run(folder, tmp_path / "out", workers=workers, shard_bytes=shard_bytes)
    assert "has changed (a name or a modification time)" in caplog.text
    assert "others are kept" in caplog.text
    assert kept == 3 or workers == 2
    # A second worker may have finished its part while the first run ended.
    assert len(made) == 4 - kept or (workers == 2 and 1 <= len(made) < 4 - kept)
    assert meta.documents == 20
    assert texts_of(tmp_path / "out")[-1].startswith("3/4")


def test_unfinished_parts_of_another_job_are_explained(source: Path, tmp_path: Path) -> None:
    with source.open("a") as file:
        file.write("bad\n")
    with pytest.raises(DataError, match="not JSON"):
        run(source, tmp_path / "out")
    with pytest.raises(DataError, match=r"out.partial holds the unfinished parts of another job: holdout was 0.0"):
        run(source, tmp_path / "out", holdout=0.5)


def test_a_second_process_on_the_same_stream_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is preparing this stream"):
            run(source, tmp_path / "out")
    assert run(source, tmp_path / "out").documents == len(TEXTS)


class FullDisk:
    """Lets `room` bytes be written through IndexedWriter, in all files together, and then is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, code: int) -> None:
        self.room = room
        original = indexed.IndexedWriter._write

        def write(writer: indexed.IndexedWriter, chunk: bytes) -> None:
            self.room -= len(chunk)
            if self.room < 0:
                raise OSError(code, os.strerror(code))
            original(writer, chunk)

        monkeypatch.setattr(indexed.IndexedWriter, "_write", write)


@pytest.mark.parametrize("share", [0.1, 0.6, 1.5])
@pytest.mark.parametrize(
    ("code", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk quota is used up")]
)
def test_a_full_disk_is_explained_and_the_same_command_goes_on(
    source: Path, tmp_path: Path, share: float, code: int, reason: str
) -> None:
    expected = run(source, tmp_path / "expected")
    size = expected.tokens * np.dtype(expected.dtype).itemsize
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(patch, int(size * share), code)
        with pytest.raises(
            DataError, match=rf"{reason} while preparing .*out: \d+ of \d+ parts are finished"
        ) as caught:
            run(source, tmp_path / "out")
    assert "run the same command again" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert run(source, tmp_path / "out").content_hash == expected.content_hash


def test_a_part_that_was_damaged_is_made_again(source: Path, tmp_path: Path) -> None:
    with source.open("a") as file:
        file.write("bad\n")
    with pytest.raises(DataError, match="not JSON"):
        run(source, tmp_path / "out")
    part = next((tmp_path / "out.partial" / "parts").glob("*.bin"))
    part.write_bytes(part.read_bytes()[:-2])
    write_jsonl(source, TEXTS)
    run(source, tmp_path / "out")
    assert texts_of(tmp_path / "out") == TEXTS


def test_a_place_that_cannot_be_written_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match=r"file/out.*: Not a directory"):
        run(source, tmp_path / "file" / "out")


def test_the_sources_are_written_down(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "stream.json").read_text())
    assert content["sources"][0]["path"] == str(source)
    assert content["sources"][0]["bytes"] == source.stat().st_size
