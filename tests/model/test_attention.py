"""Attention against its definition in float64: grouped queries, causality, a cache, and chunks over ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacpt.errors import ConfigError
from megacpt.model.attention import CausalAttention, _in_order, context_slice
from tests.pool import Pools


def _reference(query: np.ndarray, key: np.ndarray, value: np.ndarray, window: int | None = None) -> np.ndarray:
    """[s, b, h, d] on [t, b, g, d], the queries being the last s positions; one number after the other."""
    s, b, h, d = query.shape
    t, _, g, e = value.shape
    out = np.zeros((s, b, h, e))
    for i in range(s):
        end = t - s + i + 1
        seen = slice(0 if window is None else max(0, end - window), end)
        for n in range(b):
            for head in range(h):
                group = head // (h // g)
                scores = key[seen, n, group] @ query[i, n, head] / np.sqrt(d)
                share = np.exp(scores - scores.max())
                out[i, n, head] = share @ value[seen, n, group] / share.sum()
    return out.reshape(s, b, h * e)


def _core(dim: int, window: int | None = None, **options: Any) -> CausalAttention:
    size = None if window is None else (window - 1, 0)
    config: Any = SimpleNamespace(window_size=size, attention_dropout=0.0, kv_channels=dim)
    unused: Any = None
    return CausalAttention(config, 1, unused, "self", **options)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _three(queries: int, keys: int, batch: int, heads: int, groups: int, dim: int) -> list[torch.Tensor]:
    shapes = ((queries, heads), (keys, groups), (keys, groups))
    return [_random(length, batch, n, dim, seed=seed) for seed, (length, n) in enumerate(shapes)]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (1, 9), (4, 9), (1, 1)], ids=["all", "one", "some", "first"])
def test_it_is_what_it_is_defined_to_be(heads: int, groups: int, queries: int, keys: int) -> None:
    query, key, value = _three(queries, keys, 2, heads, groups, 8)
    expected = _reference(query.numpy(), key.numpy(), value.numpy())
    np.testing.assert_allclose(_core(8)(query, key, value).numpy(), expected, atol=1e-12)
    single = _core(8)(query.float(), key.float(), value.float())
    np.testing.assert_allclose(single.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("window", [1, 3, 8, 9, 20])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (1, 9), (4, 9), (1, 1)], ids=["all", "one", "some", "first"])
def test_a_window_is_all_that_is_seen(queries: int, keys: int, window: int) -> None:
    query, key, value = _three(queries, keys, 2, 4, 2, 8)
    expected = _reference(query.numpy(), key.numpy(), value.numpy(), window)
    np.testing.assert_allclose(_core(8, window)(query, key, value).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("width", [3, 12])
def test_values_may_have_a_width_of_their_own(width: int) -> None:
    query, key, _ = _three(9, 9, 2, 4, 4, 8)
    value = _random(9, 2, 4, width, seed=3)
    expected = _reference(query.numpy(), key.numpy(), value.numpy())
    np.testing.assert_allclose(_core(8)(query, key, value).numpy(), expected, atol=1e-12)


def test_nothing_looks_ahead() -> None:
    query, key, value = _three(12, 12, 1, 2, 2, 8)
    before = _core(8)(query, key, value)
    key[7:], value[7:] = 100.0, -100.0
    after = _core(8)(query, key, value)
    assert torch.equal(after[:7], before[:7])
    assert not torch.equal(after[7:], before[7:])


def test_the_scale_can_be_given() -> None:
    query, key, value = _three(5, 5, 1, 2, 2, 4)
    sharp = _core(4, softmax_scale=2.0)(query, key, value)
    np.testing.assert_allclose(sharp.numpy(), _reference(4 * query.numpy(), key.numpy(), value.numpy()), atol=1e-12)


def test_dropout_is_refused() -> None:
    with pytest.raises(ConfigError, match="attention dropout is not supported"):
        _core(4, attention_dropout=0.1)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2))
def test_slicing_and_joining_are_inverse(size: int, chunk: int, dim: int) -> None:
    shape = [3, 4, 5]
    shape[dim] = 2 * size * chunk
    whole = torch.arange(float(np.prod(shape))).reshape(shape)
    parts = [context_slice(whole, dim, rank, size) for rank in range(size)]
    assert {part.shape[dim] for part in parts} == {2 * chunk}
    joined = torch.cat(parts, dim).movedim(dim, 0)
    assert torch.equal(_in_order(joined, size).movedim(0, dim), whole)


@given(st.integers(1, 8), st.integers(1, 5))
def test_every_rank_has_the_same_work(size: int, chunk: int) -> None:
    positions = torch.arange(2 * size * chunk)
    work = {int((context_slice(positions, 0, rank, size) + 1).sum()) for rank in range(size)}
    assert len(work) == 1


@pytest.mark.parametrize(("heads", "groups", "window"), [(4, 4, None), (4, 2, None), (4, 2, 3), (2, 2, 6), (2, 2, 16)])
def test_over_two_ranks_it_is_the_same_with_its_gradient(
    pools: Pools, heads: int, groups: int, window: int | None
) -> None:
    length, dim = 16, 8
    arguments: dict[str, Any] = {"length": length, "heads": heads, "groups": groups, "dim": dim, "window": window}
    found = pools(2).run("tests.model.cases:attend_over_ranks", **arguments)
    draw = torch.Generator().manual_seed(4)
    query, key, value, direction = (
        torch.randn(length, 2, n, dim, generator=draw, dtype=torch.float64) for n in (heads, groups, groups, heads)
    )
    for x in (query, key, value):
        x.requires_grad_()
    out = _core(dim, window)(query, key, value)
    out.backward(direction.reshape(out.shape))
    expected = {"out": out.detach(), "query": query.grad, "key": key.grad, "value": value.grad}
    for rank, result in enumerate(found):
        for name, whole in expected.items():
            assert whole is not None
            part = context_slice(whole, 0, rank, 2).numpy()
            np.testing.assert_allclose(result[name], part, atol=1e-12, err_msg=f"{name} of rank {rank}")
