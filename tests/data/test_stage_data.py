from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpt.data.plan import Segment, Source, StagePlan
from megacpt.data.stage_data import StageData
from megacpt.data.stream import TokenStream
from megacpt.data.tokenizer import load_tokenizer
from megacpt.errors import DataError
from tests.data.conftest import MakeStream

LENGTH = 16


def new(stream: TokenStream, weight: float = 1.0, start: int = 0, key: int = 7, length: int = LENGTH) -> Source:
    meta = stream.meta
    return Source(
        meta.name,
        str(stream.folder),
        meta.content_hash,
        "new",
        None,
        weight,
        (Segment(key, length, start, None),),
    )


def seen(stream: TokenStream, *segments: Segment, weight: float = 1.0) -> Source:
    return replace(new(stream), role="replay", policy="seen", weight=weight, segments=segments)


def plan(*sources: Source, length: int = LENGTH, key: int = 3) -> StagePlan:
    return StagePlan(length, key, sources)


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenStream]:
    """Two streams of 1,001 and 701 tokens in which every position has its own value."""
    from megacpt.data.prepare import prepare

    folder = tmp_path_factory.mktemp("streams")
    made = {}
    for name, size in (("a", 1000), ("b", 700)):
        (folder / f"{name}.txt").write_text("".join(f"{name}{i:03x}" for i in range(size // 4)))
        prepare([folder / f"{name}.txt"], "bytes", folder / name, workers=1, progress=False)
        made[name] = TokenStream.open(folder / name)
    return made


def test_an_epoch_visits_each_window_once_and_neighbours_share_one_token(streams) -> None:
    data = StageData(plan(new(streams["a"])))
    windows = (streams["a"].tokens - 1) // LENGTH
    offsets = sorted(data.locate(g).offset for g in range(windows))
    assert offsets == [w * LENGTH for w in range(windows)]
    text = streams["a"].read(0, streams["a"].tokens)
    for g in range(windows):
        offset = data.locate(g).offset
        assert data.tokens(g).tolist() == text[offset : offset + LENGTH + 1].tolist()
    assert data.tokens(0).shape == (LENGTH + 1,)


def test_the_next_epoch_has_another_order(streams) -> None:
    data = StageData(plan(new(streams["a"])))
    windows = (streams["a"].tokens - 1) // LENGTH
    first, second = ([data.locate(e * windows + i).offset for i in range(windows)] for e in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_shares_are_exact_and_counts_say_so(streams) -> None:
    data = StageData(plan(new(streams["a"], 0.75), new(streams["b"], 0.25)))
    sources = [data.locate(g).source for g in range(1000)]
    assert data.counts(1000) == (750, 250)
    for g in range(1000):
        assert data.counts(g) == (sources[:g].count(0), sources[:g].count(1))


def test_a_later_start_goes_on_where_the_earlier_stage_stopped(streams) -> None:
    whole = StageData(plan(new(streams["a"])))
    rest = StageData(plan(new(streams["a"], start=23), key=99))
    assert [rest.locate(g) for g in range(100)] == [whole.locate(g + 23) for g in range(100)]


def test_fresh_replay_goes_on_in_the_order_of_its_stage(streams) -> None:
    fresh = replace(new(streams["a"], 0.5, start=10), role="replay", policy="fresh")
    data = StageData(plan(new(streams["b"], 0.5), fresh))
    whole = StageData(plan(new(streams["a"])))
    replayed = [data.locate(g).offset for g in range(40) if data.locate(g).source == 1]
    assert replayed == [whole.locate(10 + i).offset for i in range(20)]


segments_lists = st.lists(
    st.builds(
        Segment,
        key=st.integers(0, 2**62),
        seq_length=st.sampled_from([LENGTH, 2 * LENGTH, 40]),
        start=st.integers(0, 200),
        count=st.integers(0, 90),
    ),
    min_size=1,
    max_size=4,
).filter(lambda segments: any(segment.count for segment in segments))


@given(segments_lists, st.integers(0, 2**62))
@settings(max_examples=60)
def test_seen_replay_draws_each_consumed_sample_once_before_any_twice(streams, segments, key) -> None:
    consumed: Counter[int] = Counter()
    for segment in segments:
        stage = StageData(
            plan(
                new(streams["a"], start=segment.start, key=segment.key, length=segment.seq_length),
                length=segment.seq_length,
            )
        )
        for g in range(segment.count):
            begin = stage.locate(g).offset
            for cut in range(segment.seq_length // LENGTH):
                consumed[begin + cut * LENGTH] += 1
    data = StageData(plan(seen(streams["a"], *segments), key=key))
    total = consumed.total()
    for epoch in range(3):
        drawn = Counter(data.locate(g).offset for g in range(epoch * total, (epoch + 1) * total))
        assert drawn == consumed


@given(segments_lists, st.integers(0, 10**12))
@settings(max_examples=30)
def test_seen_replay_never_draws_tokens_that_were_not_consumed(streams, segments, g) -> None:
    consumed = np.zeros(streams["a"].tokens, dtype=bool)
    for segment in segments:
        stage = StageData(
            plan(
                new(streams["a"], start=segment.start, key=segment.key, length=segment.seq_length),
                length=segment.seq_length,
            )
        )
        for ordinal in range(segment.count):
            begin = stage.locate(ordinal).offset
            consumed[begin : begin + segment.seq_length + 1] = True
    data = StageData(plan(seen(streams["a"], *segments)))
    for at in range(g, g + 50):
        begin = data.locate(at).offset
        assert consumed[begin : begin + LENGTH + 1].all()


def test_draws_from_seen_samples_have_a_new_order_each_epoch_and_stage(streams) -> None:
    consumed = Segment(7, LENGTH, 0, 40)
    first, other = (StageData(plan(seen(streams["a"], consumed), key=key)) for key in (1, 2))
    epochs = [[data.locate(e * 40 + i).offset for i in range(40)] for data in (first, other) for e in (0, 1)]
    assert all(left != right for left, right in pairwise(epochs))
    original = [StageData(plan(new(streams["a"]))).locate(g).offset for g in range(40)]
    assert all(sorted(epoch) == sorted(original) for epoch in epochs)
    assert original not in epochs


def test_seen_samples_that_are_too_short_are_refused(streams) -> None:
    with pytest.raises(DataError, match=r"its seen samples have seq_length 16, this stage needs 32.*'fresh'"):
        StageData(plan(seen(streams["a"], Segment(7, LENGTH, 0, 10)), length=2 * LENGTH))


@pytest.mark.parametrize("segments", [(), (Segment(7, LENGTH, 0, 0),)])
def test_seen_replay_of_nothing_is_refused(streams, segments) -> None:
    with pytest.raises(DataError, match="seen replay has nothing to draw from"):
        StageData(plan(seen(streams["a"], *segments)))


def test_a_stream_that_is_too_short_is_refused_with_the_numbers(make_stream: MakeStream) -> None:
    stream = make_stream(["x" * 15], "short")
    with pytest.raises(DataError, match="has 16 tokens, fewer than the 17 of one sample"):
        StageData(plan(new(stream)))
    assert StageData(plan(new(make_stream(["x" * 16], "enough")))).locate(5).offset == 0


def test_another_stream_in_the_same_place_is_refused_with_both_hashes(make_stream: MakeStream, streams) -> None:
    stream = make_stream(["text " * 20])
    planned = replace(new(stream), content_hash=streams["a"].meta.content_hash)
    with pytest.raises(DataError) as caught:
        StageData(plan(planned))
    for part in (str(stream.folder), stream.meta.content_hash[:16], streams["a"].meta.content_hash[:16]):
        assert part in str(caught.value)


def test_another_tokenizer_is_refused(streams, sentencepiece_folder) -> None:
    StageData(plan(new(streams["a"])), tokenizer=load_tokenizer("bytes"))
    with pytest.raises(DataError, match="was made with tokenizer bytes"):
        StageData(plan(new(streams["a"])), tokenizer=load_tokenizer(sentencepiece_folder))


def test_a_segment_of_another_length_is_refused(streams) -> None:
    with pytest.raises(DataError, match="its segment has seq_length 8, the stage 16"):
        StageData(plan(new(streams["a"], length=8)))


def test_full_verification_reads_the_content(make_stream: MakeStream) -> None:
    stream = make_stream(["text " * 20])
    path = stream.folder / "stream.bin"
    path.write_bytes(path.read_bytes()[::-1])
    StageData(plan(new(stream)))
    with pytest.raises(DataError, match="has changed"):
        StageData(plan(new(stream)), verify="full")


def test_sample_hashes_follow_the_content_and_the_place_alone(streams) -> None:
    data = StageData(plan(new(streams["a"], 0.5), new(streams["b"], 0.5)))
    hashes = [data.sample_hash(g) for g in range(80)]
    assert len(set(hashes)) == 80
    again = StageData(plan(new(streams["a"], 0.5), new(streams["b"], 0.5)))
    assert [again.sample_hash(g) for g in range(80)] == hashes
    alone = StageData(plan(new(streams["a"])))
    assert {alone.sample_hash(g) for g in range(40)} == {h for g, h in enumerate(hashes) if data.locate(g).source == 0}


def test_streams_with_the_same_key_and_size_have_their_own_orders(make_stream: MakeStream) -> None:
    first, second = (StageData(plan(new(make_stream([letter * 999], letter)))) for letter in "xy")
    assert [first.locate(g) for g in range(50)] != [second.locate(g) for g in range(50)]
