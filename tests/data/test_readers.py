from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpt.data.inputs import cut, find_files
from megacpt.data.readers import read_documents
from megacpt.errors import DataError, SetupError
from tests.data.conftest import write_jsonl

TEXTS = ["first", "", "zweite → Zeile", "third\nwith lines", "\u2028 odd", "x" * 5000]


def texts_in(path: Path, field: str = "text", target: int = 1 << 20) -> list[str]:
    (files,) = find_files([path])
    return [d.text for shard in cut(files, target) for piece in shard for d in read_documents(piece, field)]


def compress(path: Path, kind: str) -> Path:
    content = path.read_bytes()
    packed = path.with_name(f"{path.name}.{kind}")
    packed.write_bytes(gzip.compress(content) if kind == "gz" else zstandard.compress(content))
    return packed


def write_parquet(path: Path, texts: list[str | None], group: int = 2) -> None:
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=group)


def test_a_text_file_is_one_document_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("a\r\nü\n\n".encode())
    assert texts_in(tmp_path / "a.txt") == ["a\r\nü\n\n"]


@pytest.mark.parametrize("target", [1, 7, 100, 1 << 20])
def test_json_lines_are_read_once_however_they_are_cut(tmp_path: Path, target: int) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert texts_in(tmp_path / "a.jsonl", target=target) == TEXTS


@given(st.lists(st.text(max_size=30), min_size=1, max_size=20), st.integers(1, 200), st.booleans())
@settings(max_examples=30)
def test_cuts_lose_and_repeat_nothing(tmp_path_factory: pytest.TempPathFactory, texts, target, ended) -> None:
    texts = [text.encode(errors="replace").decode() for text in texts]
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text(lines + "\n" * ended, encoding="utf-8", newline="")
    assert texts_in(path, target=target) == texts


def test_blank_lines_a_mark_at_the_start_and_windows_line_ends_are_no_matter(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert texts_in(tmp_path / "a.jsonl") == ["a", "b"]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_json_lines_are_read(tmp_path: Path, kind: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert texts_in(compress(tmp_path / "a.jsonl", kind)) == TEXTS


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_several_compressed_members_are_all_read(tmp_path: Path, kind: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    packed = compress(tmp_path / "a.jsonl", kind)
    packed.write_bytes(packed.read_bytes() * 3)
    assert texts_in(packed) == TEXTS * 3


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("lost", [1, 9, 3000])
def test_compressed_files_that_are_cut_short_lose_nothing_silently(tmp_path: Path, kind: str, lost: int) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"{i * 7919 % 10007}" for i in range(5000)])
    packed = compress(tmp_path / "a.jsonl", kind)
    packed.write_bytes(packed.read_bytes()[:-lost])
    with pytest.raises(DataError, match=rf"a.jsonl.{kind} is damaged or cut short after line \d+"):
        texts_in(packed)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_files_that_are_not_compressed_are_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"a.jsonl.{kind}").write_text('{"text": "plain"}\n')
    with pytest.raises(DataError, match=rf"a.jsonl.{kind} is damaged or cut short after line 0"):
        texts_in(tmp_path / f"a.jsonl.{kind}")


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_nothing_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no document"):
        texts_in(compress(tmp_path / "a.jsonl", kind))


@pytest.mark.parametrize("target", [1, 1 << 20])
def test_parquet_rows_are_read_once_however_they_are_cut(tmp_path: Path, target: int) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS)
    assert texts_in(tmp_path / "a.parquet", target=target) == TEXTS


def test_the_bytes_of_the_documents_add_up_to_the_input(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    write_parquet(tmp_path / "b.parquet", TEXTS)
    compress(tmp_path / "a.jsonl", "gz")
    (tmp_path / "c.txt").write_text("text")
    for piece in find_files([tmp_path])[0]:
        documents = list(read_documents(piece, "text"))
        assert sum(document.consumed for document in documents) == pytest.approx(piece.size, abs=1)
        assert all(document.size == len(document.text.encode()) for document in documents)


BAD_LINES = [
    (b'{"text": "\xff"}', r"this is not UTF-8: byte 0xff at byte 10 \(invalid start byte\)"),
    (b'{"text": "a"', "this is not JSON: "),
    (b'["a"]', "an object with the field 'text' is expected, not a list"),
    (b'{"txt": "a", "id": 1}', "there is no field 'text', only: txt, id; did you mean 'txt'?"),
    (b"{}", "there is no field 'text', only: none at all"),
    (b'{"text": null}', "the field 'text' should be text, not NoneType"),
    (b'{"text": 5}', "the field 'text' should be text, not int"),
    (b'{"text": "a\\ud800"}', "holds half a surrogate pair"),
    (b"[" * 100_000, "this JSON is nested too deeply"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
@pytest.mark.parametrize("kind", ["", "gz", "zst"])
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    path = compress(path, kind) if kind else path
    with pytest.raises(DataError) as caught:
        texts_in(path)
    assert f"{path}, line 3: " in str(caught.value)
    assert message.replace("\\(", "(").replace("\\)", ")") in str(caught.value)


def test_bad_lines_have_their_number_in_the_file_not_in_the_piece(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i}"}) for i in range(100)]
    lines[73] = '{"text": '
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a.jsonl, line 74: this is not JSON"):
        texts_in(tmp_path / "a.jsonl", target=50)


def test_text_that_is_no_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("fine\nstill ü fine\nna\xefve\n".encode("latin-1").replace(b"\xfc", b"u"))
    with pytest.raises(DataError, match=r"a.txt, line 3: this is not UTF-8: byte 0xef .* with iconv"):
        texts_in(tmp_path / "a.txt")


def test_parquet_errors_name_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ["a", "b", "c", None])
    with pytest.raises(DataError, match=r"a.parquet, row 4: the field 'text' should be text, not NoneType"):
        texts_in(path, target=1)
    with pytest.raises(DataError, match="there is no field 'txt', only: id, text; did you mean 'text'"):
        texts_in(path, field="txt")
    column = pa.array([b"ok", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(DataError, match=r"a.parquet, row 2: this is not UTF-8"):
        texts_in(path)


def test_files_that_are_no_parquet_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no parquet at all")
    with pytest.raises(DataError, match=r"a.parquet is not a Parquet file, or damaged"):
        texts_in(tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", [])
    with pytest.raises(DataError, match=r"b.parquet holds no row"):
        texts_in(tmp_path / "b.parquet")


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    ((piece,),) = find_files([tmp_path / "a.jsonl"])
    reading = read_documents(piece, "text")
    next(reading)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataError, match=r"a.jsonl has changed while it was being read"):
        list(reading)


@pytest.mark.parametrize(
    ("package", "name", "extra"), [("zstandard", "a.jsonl.zst", "zstd"), ("pyarrow", "a.parquet", "parquet")]
)
def test_missing_packages_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str, extra: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SetupError, match=rf"{name} needs the package {package}: pip install 'megacpt\[{extra}\]'"):
        texts_in(tmp_path / name)
