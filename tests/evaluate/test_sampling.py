"""Temperature, top-k and top-p against a scalar reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacpt.errors import CheckpointError, ConfigError
from megacpt.evaluate.sampling import Sampling

LOGITS = st.lists(st.integers(-60, 60), min_size=1, max_size=12, unique=True).map(lambda xs: [x / 10 for x in xs])


def reference(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """The distribution, one number at a time."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = {i: math.exp((logits[i] - max(logits)) / temperature) for i in order}
    total = sum(weights.values())
    kept, reached = [], 0.0
    for i in order:
        kept.append(i)
        reached += weights[i] / total
        if top_p is not None and reached >= top_p:
            break
    mass = sum(weights[i] for i in kept)
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(logits))]


@given(
    LOGITS,
    st.floats(0.2, 3.0),
    st.none() | st.integers(1, 14),
    st.none() | st.floats(0.05, 1.0),
)
def test_probabilities(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> None:
    found = Sampling(temperature, top_k, top_p).probabilities(torch.tensor(logits))
    expected = reference(logits, temperature, top_k, top_p)
    if top_p is not None and any(abs(p - top_p) < 1e-6 for p in _partial_sums(logits, temperature, top_k)):
        return  # rounding decides on which side of the limit a token lies
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def _partial_sums(logits: list[float], temperature: float, top_k: int | None) -> list[float]:
    ordered = sorted(reference(logits, temperature, top_k, None), reverse=True)
    return [sum(ordered[: n + 1]) for n in range(len(ordered))]


def test_draws_follow_the_distribution() -> None:
    sampling = Sampling(temperature=0.7, top_k=4)
    logits = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.7, -3.0])
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(6)
    for _ in range(4000):
        counts[sampling.choose(logits, generator)] += 1
    torch.testing.assert_close(counts / 4000, sampling.probabilities(logits).float(), rtol=0.0, atol=0.02)
    assert counts[2] == counts[5] == 0


def test_temperature_zero_is_the_argmax_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert Sampling().choose(torch.tensor([0.0, 3.0, 2.9]), generator) == 1
    assert torch.equal(generator.get_state(), before)
    assert Sampling().probabilities(torch.tensor([0.0, 3.0, 2.9])).tolist() == [0, 1, 0]


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    generator = torch.Generator().manual_seed(1)
    assert Sampling(temperature=1e-30).choose(torch.tensor([5.0, 90.0, 89.0]), generator) == 1


@pytest.mark.parametrize("top_p", [1e-9, 0.3])
def test_top_p_keeps_at_least_one_token(top_p: float) -> None:
    assert Sampling(temperature=1.0, top_p=top_p).probabilities(torch.tensor([1.0, 2.0])).tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_model_is_reported(temperature: float) -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        Sampling(temperature).choose(torch.tensor([0.0, float("nan")]), torch.Generator())


@pytest.mark.parametrize("wrong", [{"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}])
def test_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Sampling(**wrong)  # type: ignore[arg-type]
