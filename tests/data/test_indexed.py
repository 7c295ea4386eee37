from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megacpt.data import indexed as module
from megacpt.data.indexed import IndexedTokens, IndexedWriter, content_hash
from megacpt.errors import DataError

UINT16, INT32 = np.dtype(np.uint16), np.dtype(np.int32)
documents_lists = st.lists(st.lists(st.integers(0, 65_000), max_size=40), min_size=1, max_size=12).filter(any)


def write(prefix: Path, documents: list[list[int]], dtype: np.dtype = UINT16) -> str:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64))
        return writer.finish()


def write_with_megatron(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> None:
    """Write documents of several sequences each."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        ids = np.array([i for sequence in document for i in sequence])
        builder.add_document(ids, [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")


@given(documents_lists, st.sampled_from([UINT16, INT32]))
@settings(max_examples=20)
def test_megatron_reads_every_document(tmp_path_factory: pytest.TempPathFactory, documents, dtype) -> None:
    prefix = tmp_path_factory.mktemp("written") / "tokens"
    write(prefix, documents, dtype)
    theirs = IndexedDataset(str(prefix), mmap=True)
    assert theirs.index.dtype == dtype
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents


@given(st.lists(documents_lists, min_size=1, max_size=6), st.sampled_from([np.uint16, np.int32, np.int64]))
@settings(max_examples=20)
def test_it_reads_every_document_that_megatron_wrote(
    tmp_path_factory: pytest.TempPathFactory, documents, dtype
) -> None:
    prefix = tmp_path_factory.mktemp("megatron") / "tokens"
    write_with_megatron(prefix, documents, dtype)
    ours = IndexedTokens(prefix)
    joined = [[i for sequence in document for i in sequence] for document in documents]
    ours.check_positions()
    assert ours.dtype == dtype
    assert [ours.document(i).tolist() for i in range(ours.documents)] == joined
    assert ours.document_lengths(100).tolist() == [len(document) for document in joined]
    assert ours.read(0, ours.tokens).tolist() == [i for document in joined for i in document]


def test_the_files_are_byte_for_byte_megatrons(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4], [65_000, 6]]
    write(tmp_path / "ours", documents)
    write_with_megatron(tmp_path / "theirs", [[document] for document in documents])
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_extending_equals_writing_in_one_go(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4], [], [5, 6]]
    whole = write(tmp_path / "whole", documents)
    with IndexedWriter(tmp_path / "merged", UINT16) as writer:
        for name, part in {"a": documents[:1], "none": [], "b": documents[1:]}.items():
            part_hash = write(tmp_path / name, part)
            writer.extend(IndexedTokens(tmp_path / name), part_hash)
        assert writer.finish() == whole
    assert content_hash(tmp_path / "merged") == whole
    assert (writer.documents, writer.tokens) == (4, 6)


def test_extending_refuses_content_that_has_changed(tmp_path: Path) -> None:
    part_hash = write(tmp_path / "part", [[1, 2, 3]])
    (tmp_path / "part.bin").write_bytes(np.array([1, 2, 4], np.uint16).tobytes())
    with (
        IndexedWriter(tmp_path / "merged", UINT16) as writer,
        pytest.raises(DataError, match=r"part.bin or its index has changed on disk"),
    ):
        writer.extend(IndexedTokens(tmp_path / "part"), part_hash)


def test_a_document_longer_than_a_sequence_may_be_is_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SEQUENCE", 4)
    write(tmp_path / "long", [list(range(10)), [7]])
    ours, theirs = IndexedTokens(tmp_path / "long"), IndexedDataset(str(tmp_path / "long"), mmap=True)
    assert theirs.sequence_lengths.tolist() == [4, 4, 2, 1]
    assert ours.document(0).tolist() == list(range(10))
    assert ours.document(0, limit=5).tolist() == list(range(5))
    assert ours.document(1).tolist() == [7]
    assert ours.document_lengths(10).tolist() == [10, 1]


def test_many_documents_cross_the_chunks_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 3)
    documents = [[i] * (i % 3) for i in range(20)]
    digest = write(tmp_path / "many", documents)
    ours = IndexedTokens(tmp_path / "many")
    ours.check_positions()
    assert [ours.document(i).tolist() for i in range(20)] == documents
    monkeypatch.undo()
    assert content_hash(tmp_path / "many") == digest


@pytest.mark.parametrize(("suffix", "cut"), [("idx", 50), ("bin", 1), ("bin", 6), ("idx", 1), ("idx", 40)])
def test_files_that_are_cut_short_are_named_with_their_sizes(tmp_path: Path, suffix: str, cut: int) -> None:
    write(tmp_path / "tokens", [[1, 2], [3]])
    path = tmp_path / f"tokens.{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    with pytest.raises(DataError, match="is cut short") as caught:
        IndexedTokens(tmp_path / "tokens")
    message = str(caught.value)
    assert str(path) in message
    assert f"{len(content) - cut} bytes" in message
    assert str(34 if (suffix, cut) == ("idx", 50) else len(content)) in message


def test_a_longer_bin_is_not_the_file_of_the_index(tmp_path: Path) -> None:
    write(tmp_path / "tokens", [[1, 2], [3]])
    with (tmp_path / "tokens.bin").open("ab") as file:
        file.write(b"xx")
    with pytest.raises(DataError, match=r"has 8 bytes, but its index says 6: it is not the file of this index"):
        IndexedTokens(tmp_path / "tokens")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a Megatron index"),
        (b"GGUF" * 20, "is not a Megatron index"),
        (b"MMIDIDX\0\0" + bytes([2, 0, 0, 0, 0, 0, 0, 0, 8]) + bytes(16), "has version 2 and id type 8"),
        (b"MMIDIDX\0\0" + bytes([1, 0, 0, 0, 0, 0, 0, 0, 7]) + bytes(16), "has version 1 and id type 7"),
    ],
)
def test_other_files_are_no_index(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.idx").write_bytes(content)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(DataError, match=message):
        IndexedTokens(tmp_path / "x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "tokens", [[1, 2]])
    (tmp_path / "tokens.bin").unlink()
    with pytest.raises(DataError, match=r"tokens.bin is missing"):
        IndexedTokens(tmp_path / "tokens")


def test_sequences_with_a_gap_are_found(tmp_path: Path) -> None:
    write(tmp_path / "tokens", [[1, 2], [3, 4], [5, 6]])
    index = bytearray((tmp_path / "tokens.idx").read_bytes())
    # The byte position of the second sequence: after the header, three lengths and one position.
    index[34 + 12 + 8] = 2
    (tmp_path / "tokens.idx").write_bytes(index)
    with pytest.raises(DataError, match="sequence 1 does not begin where the one before it ends"):
        IndexedTokens(tmp_path / "tokens").check_positions()


def test_wrong_document_boundaries_are_found(tmp_path: Path) -> None:
    write(tmp_path / "tokens", [[1, 2], [3, 4]])
    index = bytearray((tmp_path / "tokens.idx").read_bytes())
    index[-8] = 7
    (tmp_path / "tokens.idx").write_bytes(index)
    with pytest.raises(DataError, match="the last document should end at sequence 2, not 7"):
        IndexedTokens(tmp_path / "tokens")


def test_reading_outside_is_an_index_error(tmp_path: Path) -> None:
    write(tmp_path / "tokens", [[1, 2], [3]])
    ours = IndexedTokens(tmp_path / "tokens")
    for offset, count in ((-1, 1), (0, 4), (3, 1), (0, -1)):
        with pytest.raises(IndexError):
            ours.read(offset, count)
    for document in (-1, 2):
        with pytest.raises(IndexError):
            ours.document(document)


def test_what_was_not_finished_cannot_be_opened(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "tokens", UINT16) as writer:
        writer.add(np.arange(5))
    with pytest.raises(DataError, match=r"tokens.idx is missing"):
        IndexedTokens(tmp_path / "tokens")


def test_dots_in_a_name_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "c4.en.v1", [[1]])
    assert (tmp_path / "c4.en.v1.idx").is_file()
    assert IndexedTokens(tmp_path / "c4.en.v1").tokens == 1


def test_documents_end_where_the_next_begins_however_they_are_stored(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_SEQUENCE", 3)
    lengths = [2, 0, 7, 3, 0, 0, 10, 0]
    with IndexedWriter(tmp_path / "x", np.dtype(np.uint16)) as writer:
        for length in lengths:
            writer.add(np.arange(length))
        writer.finish()
    found = IndexedTokens(tmp_path / "x")
    assert found.document_ends(0, 8).tolist() == np.cumsum(lengths).tolist()
    assert found.document_ends(2, 5).tolist() == [9, 12, 12]


def test_rows_are_filled_with_what_is_read_one_by_one(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(50))
        writer.finish()
    found, ids = IndexedTokens(tmp_path / "x"), np.full((4, 5), -1)
    found.read_into(ids, np.array([3, 0, 1]), np.array([45, 7, 0]))
    assert ids.tolist() == [[*range(7, 12)], [*range(5)], [-1] * 5, [*range(45, 50)]]
    for offset in (-1, 46):
        with pytest.raises(IndexError, match="are not all inside"):
            found.read_into(ids, np.array([0]), np.array([offset]))
