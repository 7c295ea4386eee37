"""Outcomes of single tokens, scores of continuations and answers to prompts: by hand, and in any layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megacpt.data.tokenizer import BytesTokenizer
from megacpt.evaluate.scoring import _padded
from megacpt.runtime.layout import Layout
from tests.distributed.cases import VOCAB
from tests.pool import Pools

CASES = "tests.evaluate.scoring_cases"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"parallel": {"tensor": 2}}),
    "tp2 sequence": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "cp2": (2, {"parallel": {"context": 2}}),
    "pp2": (2, {"parallel": {"pipeline": 2}}),
    "pp2 interleaved": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
    "tp2 dp2": (4, {"parallel": {"tensor": 2}}),
}


def _close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_token_has_its_outcome(pools: Pools, name: str) -> None:
    ranks, changes = LAYOUTS[name]
    results = pools(ranks).run(f"{CASES}:predict", **changes)
    (expected,) = pools(1).run(f"{CASES}:predicted_by_hand", rows=results[0]["rows"])
    assert 0.02 < expected["hits"].mean() < 0.98 or expected["hits"].any()
    for found in results:
        _close(found["nats"], expected["nats"])
        assert np.array_equal(found["hits"], expected["hits"])


def test_of_equally_likely_tokens_the_first_counts(pools: Pools) -> None:
    ((climbing, zeros),) = pools(1).run(f"{CASES}:ties")
    assert not climbing.any()
    assert zeros.all()


def _pairs() -> list[tuple[list[int], list[int]]]:
    """Contexts and continuations of many lengths, one longer together than the model's longest sequence of 64."""
    draw = np.random.default_rng(9)

    def some(count: int) -> list[int]:
        return [int(token) for token in draw.integers(0, VOCAB, count)]

    lengths = [(1, 1), (5, 3), (17, 1), (40, 24), (1, 64), (80, 10), (64, 1), (3, 0), *[(n, 2) for n in range(1, 30)]]
    return [(some(context), some(continuation)) for context, continuation in lengths]


@pytest.mark.parametrize("name", LAYOUTS)
def test_continuations_are_scored(pools: Pools, name: str) -> None:
    ranks, changes = LAYOUTS[name]
    pairs = _pairs()
    (expected,) = pools(1).run(f"{CASES}:scores_by_hand", pairs=pairs)
    for found in pools(ranks).run(f"{CASES}:scores", pairs=pairs, **changes):
        _close(np.array([nats for nats, _ in found]), np.array([nats for nats, _ in expected]))
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_one_token_is_the_greedy_one(pools: Pools) -> None:
    """Of all continuations by one token, the likeliest; together they have all probability but that of the padding."""
    (found,) = pools(1).run(f"{CASES}:scores", pairs=[([7, 8, 9], [token]) for token in range(VOCAB)])
    assert [greedy for _, greedy in found].count(True) == 1
    assert max(found)[1]
    assert 0.5 < sum(np.exp(nats) for nats, _ in found) <= 1.0001


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (([1], [2] * 65), "ConfigError: a continuation has 65 tokens, and model.max_seq_length is 64"),
        (([], [2]), "ConfigError: a continuation needs a context"),
    ],
)
def test_what_cannot_be_scored(pools: Pools, pair: tuple[list[int], list[int]], said: str) -> None:
    assert pools(1).run(f"{CASES}:refused", pairs=[pair])[0].startswith(said)


@pytest.mark.parametrize("name", ["alone", "dp2", "tp2", "tp2 dp2"])
def test_answers_are_the_same_in_every_layout(pools: Pools, name: str) -> None:
    ranks, changes = LAYOUTS[name]
    encode = BytesTokenizer().encode
    prompts = [{"tokens": encode(text).tolist(), "max_tokens": 10} for text in ("a", "the sea", "", "x = 1")]
    prompts.append({"tokens": encode("dice").tolist(), "max_tokens": 10, "temperature": 1.0, "seed": 3})
    (expected,) = pools(1).run(f"{CASES}:said", prompts=prompts)
    assert len(set(expected)) == len(prompts)
    for found in pools(ranks).run(f"{CASES}:said", prompts=prompts, **changes):
        assert found == expected


def test_answers_end_before_the_first_stop_text(pools: Pools) -> None:
    prompt = {"tokens": [116, 104, 101], "max_tokens": 30}
    ((whole,),) = pools(1).run(f"{CASES}:said", prompts=[prompt])
    early, late = whole[4:6], whole[9]
    stops = [(early,), (late, early), ("never said",), ()]
    (found,) = pools(1).run(f"{CASES}:said", prompts=[{**prompt, "stop": stop} for stop in stops])
    cut = min(whole.index(early), whole.index(late))
    assert found == [whole[: whole.index(early)], whole[:cut], whole, whole]


def test_lengths_that_a_layout_can_cut() -> None:
    assert [_padded(n, Layout()) for n in (0, 1, 7)] == [1, 1, 7]
    assert [_padded(n, Layout(context=2)) for n in (1, 4, 5)] == [4, 4, 8]
    assert [_padded(n, Layout(context=2, tensor=3, sequence=True)) for n in (1, 13)] == [12, 24]
