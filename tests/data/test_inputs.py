from __future__ import annotations

import os
from pathlib import Path

import pytest

from megacpt.data.inputs import cut, describe, find_files, shard_name
from megacpt.errors import DataError


def make(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_folders_give_their_files_sorted_and_at_any_depth(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a/z.jsonl", "a/B.TXT", "notes.md", ".hidden/x.txt", "c.jsonl.gz")
    ((*files,),) = find_files([tmp_path])
    assert [Path(file.path).relative_to(tmp_path).as_posix() for file in files] == [
        "a/B.TXT",
        "a/z.jsonl",
        "b.txt",
        "c.jsonl.gz",
    ]
    assert [file.kind for file in files] == ["text", "jsonl", "text", "jsonl.gz"]


def test_inputs_stay_in_the_order_given(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a.txt")
    found = find_files([tmp_path / "b.txt", tmp_path / "a.txt"])
    assert [Path(file.path).name for (file,) in found] == ["b.txt", "a.txt"]


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "a.pdf", "sub/x.md")
    (tmp_path / "empty.txt").touch()
    for inputs, message in [
        ([], "give at least one file"),
        ([tmp_path / "gone.txt"], r"there is no input .*gone.txt"),
        ([tmp_path / "a.pdf"], r"a.pdf is of no known kind: inputs end with .txt, .jsonl, .jsonl.gz"),
        ([tmp_path / "empty.txt"], r"empty.txt is empty: remove it"),
        ([tmp_path / "sub"], r"the folder .*sub holds no input file"),
        ([tmp_path / "a.txt", tmp_path / "a.txt"], r"a.txt is given twice"),
    ]:
        with pytest.raises(DataError, match=message):
            find_files(inputs)


def test_an_empty_file_in_a_folder_is_named_too(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(DataError, match=r"b.jsonl is empty"):
        find_files([tmp_path])


def test_large_files_are_cut_and_small_ones_gathered(tmp_path: Path) -> None:
    (tmp_path / "large.jsonl").write_text("x" * 250)
    for i in range(5):
        (tmp_path / f"small{i}.txt").write_text("y" * 40)
    ((*files,),) = find_files([tmp_path])
    shards = cut(files, 100)
    assert [[(piece.start, piece.stop) for piece in shard] for shard in shards] == [
        [(0, 100)],
        [(100, 200)],
        [(200, 250), (0, 1), (0, 1)],
        [(0, 1), (0, 1), (0, 1)],
    ]
    assert sum(piece.weight for shard in shards for piece in shard) == 450


def test_shards_and_descriptions_follow_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"

    def identity() -> tuple[str, str]:
        found = find_files([path])
        return shard_name(cut(found[0], 100)[0]), describe([path], found)[0]["listing"]

    path.write_text("one")
    first = identity()
    assert identity() == first
    os.utime(path, ns=(0, 12345))
    touched = identity()
    path.write_text("four")
    os.utime(path, ns=(0, 12345))
    longer = identity()
    assert len({first[0], touched[0], longer[0]}) == 3
    assert len({first[1], touched[1], longer[1]}) == 3
