from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.pool import Pools

CASES = "tests.model.router_cases"
E, K, TOKENS = 16, 3, 24 * 3


@pytest.mark.parametrize("scope", ["sequence", "microbatch", "data", "step"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_gates_losses_and_gradients_are_megatrons(pools: Pools, scope: str, ranks: int) -> None:
    case = f"{CASES}:beside_megatron"
    for gates, gradients, penalty in pools(ranks).run(case, scope=scope, strength=0.3, beta=0.01):
        assert gates < 1e-6
        assert gradients < 1e-5
        assert penalty < 1e-6


def _learned(pools: Pools, ranks: int = 1, steps: int = 3, **moe: Any) -> dict[str, Any]:
    first, *others = pools(ranks).run(f"{CASES}:learned", steps=steps, **moe)
    assert all(other["state"] == first["state"] and other["loads"] == first["loads"] for other in others)
    return dict(first)


@pytest.mark.parametrize("ranks", [1, 2])
def test_shares_are_those_of_the_last_step_over_all_ranks(pools: Pools, ranks: int) -> None:
    found = _learned(pools, ranks)
    (counts, *_) = pools(ranks).run(f"{CASES}:counts_of", steps=3)
    assert found["state"]["shares"] == pytest.approx([n / sum(counts[2]) for n in counts[2]], rel=1e-6)
    for load, counted in zip(found["loads"], np.array(counts), strict=True):
        shares = counted / counted.sum()
        assert load["max_load"] == pytest.approx(counted.max() / (2 * TOKENS * ranks))
        assert load["entropy"] == pytest.approx(-(shares * np.log(np.maximum(shares, 1e-300))).sum() / math.log(E))
        assert load["dropped"] == 0
    assert found["loads"][0]["penalty"] == pytest.approx(0.01, rel=1e-6)  # even shares: the strength itself
    assert found["loads"][1]["penalty"] > 0.0101
    assert found["plain"]
    assert found["idle"] == 0


def test_a_skipped_step_teaches_nothing(pools: Pools) -> None:
    assert _learned(pools, skipped=2)["state"] == _learned(pools, steps=2)["state"]


def test_a_frozen_router_learns_nothing_and_is_still_measured(pools: Pools) -> None:
    found = _learned(pools, steps=2, frozen=True, balance={"kind": "bias"}, score="sigmoid", renormalise=True)
    assert set(found["state"]["shares"]) == {1 / E}
    assert not any(found["state"]["choice_bias"])
    assert found["loads"][1]["max_load"] > K / E


def test_the_bias_moves_against_the_load(pools: Pools) -> None:
    found = _learned(pools, 2, steps=1, balance={"kind": "bias", "rate": 0.5}, score="sigmoid", renormalise=True)
    ((counts,), *_) = pools(2).run(f"{CASES}:counts_of", steps=1)
    mean = sum(counts) / E
    assert found["state"]["choice_bias"] == [0.5 * float(np.sign(mean - n)) for n in counts]
    assert not found["plain"]  # the bias belongs to the model, in evaluation too


@pytest.mark.parametrize("scope", ["rank", "data", "step"])
def test_sinkhorn_evens_the_load_in_training_and_is_off_in_evaluation(pools: Pools, scope: str) -> None:
    free = _learned(pools, 2, steps=6, balance={"kind": "none"})["loads"][-1]["max_load"]
    found = _learned(pools, 2, steps=6, balance={"kind": "sinkhorn", "scope": scope})
    # What a step learns helps the next one, whose tokens are others: with as few as here that is less even.
    most = 1.5 if scope == "step" else 1.35
    assert found["loads"][-1]["max_load"] < most * K / E < free
    assert found["plain"]
    assert any(found["state"]["log_u"])


def test_where_no_capacity_is_left_the_smallest_gates_are_dropped(pools: Pools) -> None:
    (found,) = pools(1).run(f"{CASES}:capacity", factor=1.0)
    gates, experts = found["free"]
    bound, kept = found["bound"]
    room = math.ceil(K * TOKENS / E)
    for expert in range(E):
        wanted = gates[experts == expert]
        got = bound[kept == expert]
        assert len(got) == min(room, len(wanted))
        assert torch.equal(got.sort().values, wanted.sort().values[-len(got) :] if len(got) else got)
    dropped = kept < 0
    assert dropped.any()
    assert not bound[dropped].any()
    # Evaluation has no capacity: later tokens must not take the place of earlier ones.
    assert torch.equal(found["evaluated"][1], experts)
