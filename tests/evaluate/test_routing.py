"""The measures of routing: by hand, against slow definitions, and what is kept to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megacpt.data.stream import TokenStream
from megacpt.engine.protocol import Batch, Choices
from megacpt.errors import DataError
from megacpt.evaluate import routing
from megacpt.evaluate.choices import (
    Reference,
    StreamChoices,
    by_expert,
    measures,
    read_references,
    stream_choices,
    stream_information,
    write_references,
)
from tests.small import make_stream

Experts = NDArray[np.int16]


def experts(*rows: Sequence[int]) -> Experts:
    return np.array(rows, dtype=np.int16)


@st.composite
def choices(draw: st.DrawFn, least: int = 0) -> tuple[Experts, int]:
    """Choices of k different experts of each token, some of them dropped, and the number of experts."""
    total = draw(st.integers(1, 9))
    k, n = draw(st.integers(1, total)), draw(st.integers(least, 12))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    found = np.array([random.permutation(total)[:k] for _ in range(n)], dtype=np.int16).reshape(n, k)
    found[random.random((n, k)) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -1
    return found, total


EXAMPLE = experts([0, 1], [1, 0], [2, 1], [1, -1])
"""Four tokens, two of three experts each, one choice dropped: the tokens of the experts are 2, 4 and 1."""


def test_loads_by_hand() -> None:
    assert routing.counts(EXAMPLE, 4).tolist() == [2, 4, 1, 0]
    assert routing.loads(EXAMPLE, 4).tolist() == [2 / 7, 4 / 7, 1 / 7, 0]
    assert routing.dropped(EXAMPLE) == 1 / 8
    entropy = -sum(p * math.log(p) for p in (2 / 7, 4 / 7, 1 / 7))
    assert routing.load_entropy(EXAMPLE, 4) == pytest.approx(entropy / math.log(4))


def test_the_imbalance_is_the_median_over_batches() -> None:
    assert routing.max_load(EXAMPLE, 4, 100) == 1.0  # all four tokens go to expert 1
    parts = experts([0], [0], [0], [1], [1], [2])  # in pairs, the busiest experts get 1, 1/2, 1/2 of the tokens
    assert routing.max_load(parts, 3, 2) == 0.5
    assert routing.max_load(parts, 3, 3) == (1 + 2 / 3) / 2
    assert routing.max_load(parts, 3, 4) == 0.5  # one batch of six: what is left over is no batch of its own


@given(choices(least=1), st.integers(1, 8))
def test_bounds_of_load_and_entropy(found: tuple[Experts, int], batch: int) -> None:
    layer, total = found
    n, k = layer.shape
    imbalance, kept = routing.max_load(layer, total, batch), 1 - routing.dropped(layer)
    assert 0 <= imbalance <= 1
    if kept == 1:
        assert imbalance >= k / total - 1e-12
        assert imbalance * n >= 1
    if kept > 0:
        assert -1e-12 <= routing.load_entropy(layer, total) <= 1 + 1e-12
        assert routing.loads(layer, total).sum() == pytest.approx(1)
    else:
        assert math.isnan(routing.load_entropy(layer, total))
        assert not routing.loads(layer, total).any()


def test_even_loads_have_full_entropy_and_the_least_imbalance() -> None:
    even = np.arange(64, dtype=np.int16).reshape(-1, 1) % 8
    assert routing.load_entropy(even, 8) == pytest.approx(1)
    assert routing.max_load(even, 8, 16) == 1 / 8
    one = np.zeros((64, 1), dtype=np.int16)
    assert (routing.load_entropy(one, 8), routing.max_load(one, 8, 16), routing.load_entropy(one, 1)) == (0, 1, 1)


def test_saturation_by_hand() -> None:
    before = experts([0, 1], [2, 3], [0, 3])
    after = experts([1, 0], [3, 1], [1, 2])  # the order is no difference
    assert routing.saturation(before, after) == (1 + 1 / 2 + 0) / 3


def test_dropped_choices_are_no_change_of_mind_where_both_lost_them() -> None:
    assert routing.saturation(EXAMPLE, EXAMPLE) == 1
    assert routing.saturation(experts([0, 1], [-1, -1]), experts([0, -1], [-1, -1])) == 1 / 2
    assert math.isnan(routing.saturation(experts([-1]), experts([-1])))


@given(choices(least=1), st.integers(0, 99))
def test_saturation_is_that_of_sets(found: tuple[Experts, int], seed: int) -> None:
    before, _ = found
    after = np.random.default_rng(seed).permutation(before)
    shares = [
        len(a & b) / max(len(a), len(b))
        for x, y in zip(before.tolist(), after.tolist(), strict=True)
        if (a := set(x) - {-1}, b := set(y) - {-1}) != (set(), set())
    ]
    expected = sum(shares) / len(shares) if shares else math.nan
    assert routing.saturation(before, after) == pytest.approx(expected, nan_ok=True)
    assert routing.saturation(after, before) == pytest.approx(expected, nan_ok=True)


def test_information_by_hand() -> None:
    apart, same = np.eye(2), np.full((2, 2), 0.5)
    assert routing.information(apart) == (1.0, 1.0)
    assert routing.information(same) == (0.0, 0.0)
    assert routing.information(np.array([[0.2, 0.8]])) == (0.0, 0.0)
    # Streams of weights 3/4 and 1/4 that use experts of their own: all of the entropy of the streams.
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert routing.information(apart, [3, 1]) == pytest.approx((entropy, 1))
    # H(i) = h(5/8), H(i | s) = (h(3/4) + h(1/2)) / 2
    half = np.array([[0.75, 0.25], [0.5, 0.5]])
    assert routing.information(half)[0] == pytest.approx(0.954434 - (0.811278 + 1) / 2, abs=1e-6)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 999))
def test_information_is_that_of_the_joint_distribution(streams: int, total: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    rows, weights = random.dirichlet(np.full(total, 0.4), streams), random.dirichlet(np.ones(streams))
    joint = rows * weights[:, None]
    independent = weights[:, None] * joint.sum(0)[None]
    expected = float((joint * np.log2(joint / independent, where=joint > 0, out=np.zeros_like(joint))).sum())
    bits, share = routing.information(rows, weights.tolist())
    assert bits == pytest.approx(expected, abs=1e-9)
    assert -1e-12 <= share <= 1 + 1e-9


def test_vocabulary_specialisation_by_hand() -> None:
    """Id 7 goes to expert 0 alone; of the three tokens of id 8 two go to expert 1; id 9 is there once."""
    ids = np.array([7, 7, 8, 8, 8, 9])
    layer = experts([0], [0], [1], [1], [0], [2])
    by_expert, mean = routing.vocabulary_specialisation(layer, ids, 4)
    # Expert 0: its two tokens of id 7 have 1 of 1 others there, that of id 8 has 0 of 2. Expert 1: 1 of 2, twice.
    assert by_expert[:2].tolist() == [2 / 3, 0.5]
    assert np.isnan(by_expert[2:]).all()
    assert mean == (2 + 0 + 0.5 + 0.5) / 5


@given(choices(least=1), st.integers(1, 4))
def test_vocabulary_specialisation_asks_the_other_tokens(found: tuple[Experts, int], vocabulary: int) -> None:
    layer, total = found
    ids = np.random.default_rng(len(layer)).integers(0, vocabulary, len(layer))
    answers: dict[int, list[float]] = {expert: [] for expert in range(total)}
    for n, row in enumerate(layer.tolist()):
        others = [set(layer[m].tolist()) for m in range(len(layer)) if m != n and ids[m] == ids[n]]
        for expert in set(row) - {-1}:
            answers[expert] += [sum(expert in other for other in others) / len(others)] if others else []
    by_expert, mean = routing.vocabulary_specialisation(layer, ids, total)
    expected = [np.mean(answer) if answer else np.nan for answer in answers.values()]
    assert by_expert == pytest.approx(expected, nan_ok=True)
    every = [value for answer in answers.values() for value in answer]
    assert mean == pytest.approx(np.mean(every) if every else np.nan, nan_ok=True)


def test_experts_that_ignore_ids_are_specialised_as_much_as_they_are_loaded() -> None:
    random = np.random.default_rng(0)
    layer = random.choice(4, size=(50_000, 1), p=[0.1, 0.2, 0.3, 0.4]).astype(np.int16)
    rare = random.integers(0, 20_000, 50_000)  # two or three tokens an id
    by_expert, _ = routing.vocabulary_specialisation(layer, rare, 4)
    assert by_expert == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)


def test_co_activation_by_hand() -> None:
    matrix = routing.co_activation(EXAMPLE, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [2 / 4, 1, 1 / 4, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    # The most frequent partners are there for 1, 1/2 and 1 of the tokens of experts with 2, 4 and 1 of 7 choices.
    assert routing.partnership(EXAMPLE, 4) == pytest.approx((2 * 1 + 4 * 0.5 + 1 * 1) / 7)


@given(choices())
def test_co_activation_counts_pairs(found: tuple[Experts, int]) -> None:
    layer, total = found
    rows = [set(row) for row in layer.tolist()]
    for i, of_expert in enumerate(routing.co_activation(layer, total)):
        own = [row for row in rows if i in row]
        assert of_expert == pytest.approx([sum(j in row for row in own) / max(len(own), 1) for j in range(total)])
    share = routing.partnership(layer, total)
    assert math.isnan(share) == (not (layer >= 0).any())


def test_partners_that_always_go_together() -> None:
    pairs = experts([0, 1], [3, 2], [1, 0], [2, 3])
    assert routing.partnership(pairs, 4) == 1
    every = experts(*[(i, j) for i in range(4) for j in range(4) if i != j])
    assert routing.partnership(every, 4) == pytest.approx(1 / 3)
    assert routing.partnership(experts([0], [1]), 4) == 0


class Echo:
    """An engine of two data-parallel ranks whose layers 2 and 4 send a token to experts that follow from its id."""

    data_rank, data_size, microbatch_multiple = 0, 2, 1

    def __init__(self, experts: int | None) -> None:
        self.experts = experts

    def choices(self, batches: Sequence[Batch]) -> Choices | None:
        """The other rank's rows are all expert 0; the caller has to know which rows are whose."""
        if self.experts is None:
            return None
        own = np.stack([batch.tokens[:, :-1] for batch in batches])  # [m, b, L]
        both = np.stack([own, np.zeros_like(own)], axis=1).reshape(-1, own.shape[-1])
        layers = [np.stack([both % self.experts, (both + 1) % self.experts], axis=-1), np.stack([both * 0, both], -1)]
        return Choices(np.stack(layers).astype(np.int16), (2, 4))


def test_the_choices_of_a_stream_are_those_of_its_tokens(tmp_path: Path) -> None:
    stream = TokenStream.open(make_stream(tmp_path, "english", 3))
    tokens = stream.tokens
    found = stream_choices(Echo(4), stream, 16, 150, 2)  # type: ignore[arg-type]
    assert found is not None
    assert found.layers == (2, 4)
    assert found.ids.tolist() == stream.read(0, 150).tolist()
    assert found.experts.shape == (2, 150, 2)
    # Rows go to the ranks in turn, two at a time; padding at the end counts for nothing.
    own = (np.arange(150) // 32) % 2 == 0
    assert found.experts[0, own, 0].tolist() == (found.ids[own] % 4).tolist()
    assert not found.experts[1, ~own].any()
    whole = stream_choices(Echo(4), stream, 16, 10**6, 2)  # type: ignore[arg-type]
    assert whole is not None
    assert len(whole.ids) == tokens - 1
    assert whole.sample != found.sample
    assert stream_choices(Echo(None), stream, 16, 150, 2) is None  # type: ignore[arg-type]


def _choices(*layers: Experts, ids: Sequence[int] | None = None, sample: str = "sample") -> StreamChoices:
    tokens = np.arange(len(layers[0])) if ids is None else np.array(ids)
    return StreamChoices(sample, tuple(range(1, len(layers) + 1)), tokens, np.stack(layers))


def test_the_measures_of_a_stream_have_a_number_a_layer() -> None:
    even = experts([0, 1], [1, 2], [2, 0], [0, 1], [1, 2], [2, 0])
    found = measures(_choices(even, even * 0 - 1 + (even == 0), ids=[5, 5, 5, 6, 6, 6]), 3)
    assert found["max_load"] == [4 / 6, 4 / 6]
    assert found["entropy"] == [pytest.approx(1), 0]
    assert found["dropped"] == [0, 8 / 12]
    assert found["vocabulary"] == [0.5, 0.5]  # each pair of tokens shares one expert of two
    assert found["co_activation"] == [0.5, 0]
    assert "co_activation" not in measures(_choices(even[:, :1]), 3)
    single = by_expert(_choices(even, ids=[5, 5, 5, 6, 6, 6]), 3)
    assert single == {"expert_load": [[1 / 3] * 3], "expert_vocabulary": [[0.5] * 3]}


def test_information_over_streams_is_per_layer() -> None:
    zero, one = experts([0], [0]), experts([1], [1])
    found = stream_information({"a": _choices(zero, zero), "b": _choices(zero, one)}, 2)
    assert found == {"information": [0.0, 1.0], "information_share": [0.0, 1.0]}


def test_references_come_back_as_they_were(tmp_path: Path) -> None:
    path, layers = tmp_path / "routing.npz", np.stack([EXAMPLE, EXAMPLE[::-1]])
    kept = {"start": {"english": Reference("a", layers), "c": Reference("b", layers[:1])}, "home": {}}
    kept["home"]["english"] = Reference("c", layers[1:])
    write_references(path, kept)
    found = read_references(path)
    assert {group: list(streams) for group, streams in found.items()} == {
        "start": ["english", "c"],
        "home": ["english"],
    }
    for group, streams in kept.items():
        for stream, one in streams.items():
            assert found[group][stream].sample == one.sample
            assert np.array_equal(found[group][stream].experts, one.experts)
            assert found[group][stream].experts.dtype == np.int16
    assert [entry.name for entry in tmp_path.iterdir()] == ["routing.npz"]
    write_references(path, {})
    assert read_references(path) == {}


@pytest.mark.parametrize("content", [b"", b"nonsense", None, "cut"])
def test_a_file_that_holds_no_references_is_named(content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / "routing.npz"
    if content == "cut":
        write_references(path, {"start": {"c": Reference("a", EXAMPLE[None])}})
        path.write_bytes(path.read_bytes()[:-40])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"routing\.npz cannot be read as choices of experts"):
        read_references(path)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "routing.npz"
    np.savez(path, index=np.array([{"format": 1}], dtype=object))
    with pytest.raises(DataError, match="pickle"):
        read_references(path)


def test_only_the_same_sample_is_compared() -> None:
    now = _choices(EXAMPLE, EXAMPLE)
    assert Reference("sample", now.experts[::-1]).saturation(now) == [1, 1]
    assert Reference("other", now.experts).saturation(now) is None
    assert Reference("sample", now.experts[:, :, :1]).saturation(now) is None
