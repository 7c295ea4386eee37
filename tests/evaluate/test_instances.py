"""The record of instances: every token once, in its document; the same in any layout; and back from disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.stream import TokenStream
from megacpt.engine.protocol import Batch, Predictions
from megacpt.errors import DataError, SetupError
from megacpt.evaluate.instances import Header, Instance, measure_documents, read_record, record_writer
from tests.evaluate.test_scoring import LAYOUTS
from tests.pool import Pools
from tests.small import make_stream

CASES = "tests.evaluate.scoring_cases"
HEADER = Header("runs/x", "0123", "bytes", {"news": "81cc"})


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_stream(tmp_path_factory.mktemp("streams"), "english", 12))


def test_documents_by_hand(pools: Pools, stream: str) -> None:
    ((lines, loss, plain),) = pools(1).run(f"{CASES}:documents", stream=stream)
    (expected,) = pools(1).run(f"{CASES}:documents_by_hand", stream=stream)
    assert len(lines) == len(expected) == TokenStream.open(stream).documents
    for index, (line, outcomes) in enumerate(zip(lines, expected, strict=True)):
        found, content = Instance.from_json(line), json.loads(line)
        assert (found.stream, found.index, content["kind"]) == ("news", index, "document")
        assert found.hit.tolist() == [hit for _, hit in outcomes]
        assert content["hits"] == sum(hit for _, hit in outcomes)
        assert found.nats == pytest.approx(sum(nats for nats, _ in outcomes), rel=1e-5)
    assert loss.tokens == plain.tokens == sum(map(len, expected))
    assert loss.loss == pytest.approx(plain.loss, rel=1e-6)
    assert loss.bits_per_byte == pytest.approx(plain.bits_per_byte, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "alone"])
def test_the_layout_does_not_matter(pools: Pools, stream: str, name: str) -> None:
    ranks, changes = LAYOUTS[name]
    ((lines, loss, _),) = pools(1).run(f"{CASES}:documents", stream=stream, tokens=200)
    expected = [Instance.from_json(line) for line in lines]
    assert loss.tokens == sum(one.tokens for one in expected) == 200
    for others, other_loss, _ in pools(ranks).run(f"{CASES}:documents", stream=stream, tokens=200, **changes):
        found = [Instance.from_json(line) for line in others]
        assert [(one.index, one.hit.tolist()) for one in found] == [(one.index, one.hit.tolist()) for one in expected]
        assert [one.nats for one in found] == pytest.approx([one.nats for one in expected], rel=1e-5)
        assert other_loss.loss == pytest.approx(loss.loss, rel=1e-6)


@pytest.mark.parametrize(
    ("ranks", "changes"), [(1, {}), (1, {"dropout": 0.3}), (2, {"parallel": {"tensor": 2}, "dropout": 0.3})]
)
def test_training_does_not_notice(pools: Pools, stream: str, ranks: int, changes: dict[str, Any]) -> None:
    for found in pools(ranks).run(f"{CASES}:beside_training", stream=stream, **changes):
        assert found["plain"] == found["watched"]


def test_dropout_is_there_to_be_noticed(pools: Pools, stream: str) -> None:
    (without,) = pools(1).run(f"{CASES}:beside_training", stream=stream)
    (with_it,) = pools(1).run(f"{CASES}:beside_training", stream=stream, dropout=0.3)
    assert without["plain"] != with_it["plain"]


# Which token belongs to which document, without a model: the loss of a token is its id, and even ids are hits.


@dataclass
class Reader:
    """One rank's engine without a model."""

    data_rank: int = 0
    data_size: int = 1
    microbatch_multiple: int = 1

    def predict(self, batches: list[Batch]) -> Predictions:
        targets = np.concatenate([batch.tokens[:, 1:] for batch in batches])
        return Predictions(targets.astype(np.float32), targets % 2 == 0)


@dataclass
class Indexed:
    """The index of documents of `sequences` sequences, whose lengths follow each other in `lengths`."""

    sequence_lengths: np.ndarray
    boundaries: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.boundaries) - 1


class Numbers:
    """A stream whose token at place i is i, cut into documents of sequences of these lengths."""

    def __init__(self, documents: list[list[int]]) -> None:
        lengths = [length for document in documents for length in document]
        self.indexed = Indexed(np.array(lengths, np.int32), np.cumsum([0, *map(len, documents)]))
        self.tokens, self.folder = sum(lengths), Path("numbers")

    def read(self, offset: int, count: int) -> np.ndarray:
        assert offset + count <= self.tokens
        return np.arange(offset, offset + count)


@given(
    st.lists(st.lists(st.integers(0, 12), max_size=3), max_size=30),
    st.none() | st.integers(1, 200),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_every_token_is_in_its_document(
    documents: list[list[int]], limit: int | None, length: int, microbatch: int
) -> None:
    stream: Any = Numbers([*documents, [2]])
    found = list(measure_documents(Reader(), "x", stream, length, limit, microbatch))  # type: ignore[arg-type]
    last = stream.tokens if limit is None else min(stream.tokens, limit + 1)
    begin = 0
    expected = []
    for index, document in enumerate([*documents, [2]]):
        end = begin + sum(document)
        tokens = range(max(begin, 1), min(end, last))
        if tokens:
            expected.append((index, float(sum(tokens)), [token % 2 == 0 for token in tokens]))
        begin = end
    assert [(one.index, one.nats, one.hit.tolist()) for one in found] == expected


@given(
    st.text(min_size=1),
    st.integers(0, 10**9),
    st.none() | st.floats(0, 1e9),
    st.lists(st.booleans(), min_size=1, max_size=40),
)
def test_a_line_comes_back(stream: str, index: int, nats: float | None, hit: list[bool]) -> None:
    line = Instance(stream, index, nats, np.array(hit)).to_json()
    found = Instance.from_json(line)
    assert (found.stream, found.index, found.hit.tolist()) == (stream, index, hit)
    assert (found.nats is None) == (nats is None)
    assert nats is None or found.nats == pytest.approx(nats, abs=1e-6)
    assert json.loads(line)["hits"] == sum(hit)
    assert "\n" not in line


def _write(path: Path) -> list[str]:
    with record_writer(path, HEADER) as write:
        for index in range(3):
            write(Instance("news", index, 1.5, np.array([True, False, True])))
    return path.read_text().splitlines()


def test_a_record_comes_back(tmp_path: Path) -> None:
    assert len(_write(tmp_path / "x.jsonl")) == 4
    header, instances = read_record(tmp_path / "x.jsonl")
    assert header == HEADER
    assert [one.index for one in instances] == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_crash_leaves_the_old_record(tmp_path: Path) -> None:
    before = _write(tmp_path / "x.jsonl")
    with pytest.raises(KeyboardInterrupt), record_writer(tmp_path / "x.jsonl", HEADER):
        raise KeyboardInterrupt
    assert (tmp_path / "x.jsonl").read_text().splitlines() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_record_that_cannot_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(SetupError, match=r"nowhere/x.jsonl cannot be written"),
        record_writer(tmp_path / "nowhere" / "x.jsonl", HEADER),
    ):
        pass


@pytest.mark.parametrize(
    ("number", "line", "said"),
    [
        (1, "", "is not an instance record of format 1: write one with"),
        (1, '{"kind": "header", "format": 2}', "is not an instance record"),
        (1, "[]", "is not an instance record"),
        (3, '{"kind": "document"', "line 3, is not an instance"),
        (3, '{"stream": "news", "index": 1, "tokens": 9, "nats": 1, "hits": 1, "hit": "80"}', "9 tokens do not fit"),
        (3, '{"stream": "news", "index": 1, "tokens": 3, "nats": 1, "hits": 2, "hit": "80"}', "the number of hits"),
        (4, '{"stream": "news"}', "line 4, is not an instance"),
    ],
)
def test_a_damaged_record(tmp_path: Path, number: int, line: str, said: str) -> None:
    lines = _write(tmp_path / "x.jsonl")
    lines[number - 1] = line
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=said):
        list(read_record(tmp_path / "x.jsonl")[1])


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x.jsonl cannot be read: No such file"):
        read_record(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="it is not text"):
        read_record(tmp_path / "x.jsonl")
