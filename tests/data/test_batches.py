from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpt.data.batches import eval_windows, microbatches
from megacpt.data.plan import Phase, Segment, Source, StagePlan, Subset
from megacpt.data.stage_data import StageData
from megacpt.errors import ConfigError, DataError
from tests.data.conftest import MakeStream, write_stream

LENGTH = 8


@pytest.fixture
def data(make_stream: MakeStream) -> StageData:
    stream = make_stream(["".join(f"{i:04}" for i in range(300))])
    source = Source("s", str(stream.folder), stream.meta.content_hash, "new", None, 1.0, (Segment(1, LENGTH, 0, None),))
    return StageData(StagePlan(LENGTH, 1, (source,)))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> StageData:
    """Two streams, a subset and replay, whose shares change on the way."""
    folder = tmp_path_factory.mktemp("endless")
    one, two = write_stream(folder / "one", [5000]), write_stream(folder / "two", [300, 400])
    kinds = (Segment(1, LENGTH, 0, None), Segment(1, LENGTH, 4, None, Subset(50)), Segment(1, LENGTH, 0, 99))
    sources = [
        Source(s.meta.name, str(s.folder), s.meta.content_hash, "new", None, 1.0, (kind,))
        for s, kind in zip((one, two), kinds, strict=False)
    ]
    sources.append(replace(sources[0], role="replay", policy="seen", segments=kinds[2:]))
    return StageData(StagePlan(LENGTH, 1, tuple(sources), (Phase(30, (3, 1, 0)), Phase(10**6, (1, 1, 2), 10**6))))


@pytest.mark.parametrize(
    ("microbatch", "ranks"), [(1, 1), (2, 1), (12, 1), (1, 2), (3, 2), (1, 3), (2, 3), (4, 3), (1, 12)]
)
@pytest.mark.parametrize("step", [0, 7])
def test_the_global_batch_does_not_depend_on_ranks_or_microbatch(
    data: StageData, step: int, microbatch: int, ranks: int
) -> None:
    by_rank = [microbatches(data, step, 12, microbatch, rank, ranks) for rank in range(ranks)]
    assert all(len(batches) == 12 // (microbatch * ranks) for batches in by_rank)
    assert all(batch.shape == (microbatch, LENGTH + 1) for batches in by_rank for batch in batches)
    # In the order of samples: microbatch by microbatch, and in each the ranks one after another.
    in_order = np.concatenate([batches[m] for m in range(len(by_rank[0])) for batches in by_rank])
    expected = np.stack([data.tokens(step * 12 + i) for i in range(12)])
    assert (in_order == expected).all()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**9))
@settings(max_examples=40)
def test_any_ranks_and_microbatch_share_out_the_same_samples(endless, microbatch, ranks, times, step) -> None:
    sequences = microbatch * ranks * times
    by_rank = [microbatches(endless, step, sequences, microbatch, rank, ranks) for rank in range(ranks)]
    in_order = np.concatenate([batches[m] for m in range(times) for batches in by_rank])
    assert (in_order == endless.batch(step * sequences, sequences)).all()


@pytest.mark.parametrize(("sequences", "microbatch", "ranks"), [(12, 5, 1), (12, 4, 2), (1, 1, 2), (4, 0, 1)])
def test_batches_that_do_not_divide_are_refused(data: StageData, sequences: int, microbatch: int, ranks: int) -> None:
    with pytest.raises(ConfigError, match=rf"batch.sequences \({sequences}\) must be a multiple"):
        microbatches(data, 0, sequences, microbatch, 0, ranks)


@pytest.mark.parametrize("size", [2, 8, 9, 10, 16, 17, 50])
@pytest.mark.parametrize("limit", [None, 1, 8, 13, 1000])
def test_evaluation_predicts_each_token_once(make_stream: MakeStream, size: int, limit: int | None) -> None:
    stream = make_stream(["".join(chr(97 + i % 26) for i in range(size - 1))])
    assert stream.tokens == size
    targets, inputs = [], []
    for ids, valid in eval_windows(stream, LENGTH, limit):
        assert ids.shape == (LENGTH + 1,)
        assert valid.shape == (LENGTH,)
        assert not ids[1:][~valid].any()
        inputs += ids[:-1][valid].tolist()
        targets += ids[1:][valid].tolist()
    count = min(size - 1, limit or size)
    text = stream.read(0, size).tolist()
    assert inputs == text[:count]
    assert targets == text[1 : count + 1]


def test_a_stream_of_one_token_cannot_be_evaluated(make_stream: MakeStream, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make_stream(["a"])
    monkeypatch.setattr(stream, "tokens", 1)
    with pytest.raises(DataError, match="has 1 tokens: at least 2 are needed"):
        next(eval_windows(stream, LENGTH, None))
