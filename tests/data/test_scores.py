from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpt.data import scores as module
from megacpt.data.adopt import adopt
from megacpt.data.indexed import score_file
from megacpt.data.prepare import prepare
from megacpt.data.scores import ranked_windows, window_scores
from megacpt.data.stream import TokenStream
from megacpt.errors import DataError
from tests.data.conftest import write_jsonl, write_stream

RECORDS = [{"text": f"document {i} " + "x" * (i % 17), "quality": (i * 37 % 101) / 8} for i in range(120)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def run(source: Path, out: Path, **settings):
    return prepare([source], "bytes", out, **{"workers": 1, "progress": False, "score": "quality", **settings})


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(-4, 4)), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(1, 9),
)
@settings(max_examples=80)
def test_the_score_of_a_window_is_the_mean_over_its_tokens(tmp_path_factory, documents, length, chunk) -> None:
    lengths, values = [n for n, _ in documents], [float(score) for _, score in documents]
    stream = write_stream(tmp_path_factory.mktemp("scored") / "s", lengths, values)
    by_token = np.repeat(values, lengths)
    expected = [by_token[w * length : (w + 1) * length].mean() for w in range(max(0, (sum(lengths) - 1) // length))]
    found = list(window_scores(stream, length, chunk))
    np.testing.assert_allclose(np.concatenate([*found, []]), expected, rtol=1e-12, atol=1e-12)


def test_windows_inside_one_document_have_exactly_its_score(tmp_path: Path) -> None:
    stream = write_stream(tmp_path / "s", [700, 300], [0.1, 0.7])
    assert set(np.concatenate(list(window_scores(stream, 100)))) == {0.1, 0.7}


def test_the_ranking_rises_holds_every_window_and_tears_equals_apart(tmp_path: Path) -> None:
    stream = write_stream(tmp_path / "s", [1000, 1000, 1001], [5.0, -1.0, 2.0])
    ranked = ranked_windows(stream, 10)
    values = np.concatenate(list(window_scores(stream, 10)))
    assert sorted(ranked.tolist()) == list(range(300))
    assert (np.diff(values[ranked]) >= 0).all()
    assert np.mean(np.diff(ranked[:100].astype(int)) == 1) < 0.1


def test_the_ranking_is_made_once_and_kept_beside_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = write_stream(tmp_path / "s", [300, 301], [1.0, 0.0])
    first = ranked_windows(stream, 10).tolist()
    monkeypatch.setattr(module, "window_scores", None)
    assert ranked_windows(stream, 10).tolist() == first
    assert [path.name for path in stream.folder.glob("*.tmp")] == []
    # Another length, or another content, is another ranking.
    with pytest.raises(TypeError):
        ranked_windows(stream, 20)


def test_beside_a_stream_that_cannot_be_written_the_cache_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = write_stream(tmp_path / "s", [300, 301], [1.0, 0.0])
    expected = ranked_windows(stream, 10).tolist()
    stream.folder = Path("/dev/null/read-only")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert ranked_windows(stream, 10).tolist() == expected
    assert len(list((tmp_path / "cache" / "megacpt").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/none")
    with pytest.raises(DataError, match=r"ranks.*cannot be written"):
        ranked_windows(stream, 30)


def test_streams_without_scores_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no scores.*--score FIELD"):
        ranked_windows(write_stream(tmp_path / "s", [100]), 10)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_scores_follow_their_documents(source: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"again.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=50)
    else:
        path.write_bytes(gzip.compress(source.read_bytes()) if kind.endswith("gz") else source.read_bytes())
    meta = run(path, tmp_path / "out")
    found = TokenStream.open(tmp_path / "out", verify="full").indexed.scores
    assert found is not None
    assert found.tolist() == [record["quality"] for record in RECORDS]
    assert meta.settings["score"] == "quality"


def test_any_number_of_workers_and_a_holdout_give_each_document_its_score(source: Path, tmp_path: Path) -> None:
    one = run(source, tmp_path / "one", shard_bytes=500, holdout=0.2)
    two = run(source, tmp_path / "two", shard_bytes=1500, holdout=0.2, workers=2)
    assert one.content_hash == two.content_hash
    quality = {record["text"].encode(): record["quality"] for record in RECORDS}
    for name in ("one", "one-valid"):
        stream = TokenStream.open(tmp_path / name)
        texts = [bytes(stream.document(i)[:-1].astype(np.uint8)) for i in range(stream.documents)]
        assert stream.indexed.scores.tolist() == [quality[text] for text in texts]


def test_scores_are_part_of_the_content(source: Path, tmp_path: Path) -> None:
    scored, plain = run(source, tmp_path / "scored"), run(source, tmp_path / "plain", score=None)
    assert scored.content_hash != plain.content_hash
    assert "score" not in plain.settings
    path = score_file(tmp_path / "scored" / "scored")
    np.save(path, np.load(path)[::-1])
    TokenStream.open(tmp_path / "scored")
    with pytest.raises(DataError, match="has changed"):
        TokenStream.open(tmp_path / "scored", verify="full")
    np.save(path, np.zeros(3))
    with pytest.raises(DataError, match="does not hold a float64 for each of 120 documents"):
        ranked_windows(TokenStream.open(tmp_path / "scored"), 10)
    path.write_bytes(b"no scores")
    with pytest.raises(DataError, match="is no file of scores"):
        ranked_windows(TokenStream.open(tmp_path / "scored"), 10)


def test_asking_for_other_scores_is_another_stream(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", score=None)
    with pytest.raises(DataError, match="score was None and is now 'quality'"):
        run(source, tmp_path / "out")


def test_adopted_files_keep_their_scores(tmp_path: Path) -> None:
    prefix = write_stream(tmp_path / "made", [50, 51]).folder / "made"
    np.save(score_file(prefix), np.array([1.0, 2.0]))
    adopt(prefix, "bytes", tmp_path / "adopted", progress=False)
    assert ranked_windows(TokenStream.open(tmp_path / "adopted", verify="full"), 10).tolist()[-1] >= 5


@pytest.mark.parametrize("value", ["high", None, True, float("nan"), [1]])
def test_what_is_no_number_is_refused_with_its_line(tmp_path: Path, value) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a", "quality": 1}) + "\n" + json.dumps({"text": "b", "quality": value}) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the field 'quality' should be a finite number"):
        run(path, tmp_path / "out")


def test_missing_scores_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no field 'qualty'.*quality.*choose it with --score"):
        run(source, tmp_path / "out", score="qualty")
    write_jsonl(tmp_path / "plain.jsonl", ["a"])
    with pytest.raises(DataError, match=r"line 1: there is no field 'quality', only: id, text"):
        run(tmp_path / "plain.jsonl", tmp_path / "other")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a\.txt is plain text, which has no field 'quality'"):
        run(tmp_path / "a.txt", tmp_path / "text")
