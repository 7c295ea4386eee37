from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megacpt.demo import corpora as module
from megacpt.demo.corpora import Corpus, write_corpora
from megacpt.errors import DataError, SetupError

CAP = 200_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora") / "text"
    write_corpora(folder, CAP)
    return folder


def documents(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["english", "python", "c"])
def test_each_domain_is_filled_to_its_cap_with_documents_that_occur_once(folder: Path, name: str) -> None:
    corpus = write_corpora(folder, CAP)[name]
    train, valid = documents(corpus.train), documents(corpus.valid)
    texts = [document["text"] for document in train + valid]
    assert len(train) == corpus.documents
    assert sum(len(document["text"].encode()) for document in train) == corpus.bytes
    assert 0.9 * CAP < corpus.bytes <= CAP
    assert 0 < len(valid) < 0.2 * len(train)
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) > 100


def test_the_domains_hold_what_their_names_say(folder: Path) -> None:
    corpora = write_corpora(folder, CAP)
    assert list(corpora) == ["english", "python", "c"]
    for document in documents(corpora["python"].train):
        assert document["source"].endswith(".py")
        compile(document["text"], document["source"], "exec", dont_inherit=True)
    for document in documents(corpora["c"].train):
        assert document["source"].startswith(("torch/", "numpy/"))
    english = " ".join(document["text"] for document in documents(corpora["english"].train))
    assert english.count(" the ") > 0.02 * len(english.split())


def test_a_second_call_leaves_everything_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)
    monkeypatch.delattr(module, "_collect")
    corpora = write_corpora(folder, CAP)
    assert contents(folder) == before
    assert corpora["c"] == Corpus(
        "c", folder / "c-train.jsonl", folder / "c-valid.jsonl", corpora["c"].documents, corpora["c"].bytes
    )


def test_the_text_is_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    write_corpora(tmp_path, CAP)
    assert contents(tmp_path) == contents(folder)


def small_machine(monkeypatch: pytest.MonkeyPatch, documents: int = 400) -> None:
    """Let the machine hold a few small files, so that the collecting takes no time."""
    letters = "".join(chr(97 + i % 26) for i in range(200))

    def names(suffix: str) -> list[tuple[str, Path]]:
        return [(f"{i}{suffix}", Path(f"{i}{suffix}")) for i in range(documents)]

    monkeypatch.setattr(module.python_source, "topics", lambda: iter([]))
    monkeypatch.setattr(module.python_source, "files", lambda: iter(names(".py")))
    monkeypatch.setattr(module.python_source, "split", lambda path: (f"{path}{letters}", [f"doc {path}{letters}"]))
    monkeypatch.setattr(module.headers, "files", lambda: iter(names(".h")))
    monkeypatch.setattr(module.headers, "clean", lambda path: f"{path}{letters}")


@pytest.mark.parametrize("damage", ["truncated", "missing", "no summary", "broken summary", "other summary"])
def test_damaged_files_are_made_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_machine(monkeypatch)
    write_corpora(tmp_path, CAP)
    whole, train, summary = contents(tmp_path), tmp_path / "python-train.jsonl", tmp_path / "corpora.json"
    if damage == "truncated":
        train.write_bytes(train.read_bytes()[:-1])
    elif damage == "missing":
        train.unlink()
    elif damage == "no summary":
        summary.unlink()
    else:
        summary.write_text("{" if damage == "broken summary" else "[1, 2]")
    write_corpora(tmp_path, CAP)
    assert contents(tmp_path) == whole


def test_another_cap_makes_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_machine(monkeypatch)
    larger = write_corpora(tmp_path, CAP)
    smaller = write_corpora(tmp_path, 30_000)
    assert all(smaller[name].bytes <= 30_000 < larger[name].bytes for name in larger)


def test_a_crash_while_writing_is_made_good_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_machine(monkeypatch)
    write_corpora(tmp_path / "whole", CAP)
    written = 0

    def full_disk(path: Path, content: bytes) -> None:
        nonlocal written
        written += 1
        if written > 2:
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    with monkeypatch.context() as context:
        context.setattr(module, "write_bytes", full_disk)
        with pytest.raises(OSError, match="No space"):
            write_corpora(tmp_path / "half", CAP)
    write_corpora(tmp_path / "half", CAP)
    assert contents(tmp_path / "half") == contents(tmp_path / "whole")


def test_a_cap_that_leaves_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_machine(monkeypatch)
    with pytest.raises(DataError, match="max_bytes=100 leaves the domain 'english' without text"):
        write_corpora(tmp_path, 100)
    assert contents(tmp_path) == {}


def test_a_python_without_its_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "nothing"))
    with pytest.raises(SetupError, match=r"source of the standard library is not in .*nothing"):
        write_corpora(tmp_path / "text", CAP)


def test_a_python_without_help_texts_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(SetupError, match=r"pydoc_data\.topics"):
        write_corpora(tmp_path / "text", CAP)
