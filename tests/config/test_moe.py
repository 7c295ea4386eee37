from __future__ import annotations

from typing import Any

import pytest

from megacpt.config import check_layout, load_model, run_from_mapping
from megacpt.errors import ConfigError, LayoutError
from tests.config.helpers import plain_run

SIZES: dict[str, Any] = {"layers": 4, "hidden": 64, "ffn": 96, "heads": 4}


def _model(**moe: Any) -> Any:
    return load_model({**SIZES, "moe": {"experts": 8, **moe}})


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        ({}, [True] * 4),
        ({"first_dense": 1}, [False, True, True, True]),
        ({"every": 2}, [True, False, True, False]),
        ({"every": 2, "first_dense": 1}, [False, True, False, True]),
        ({"every": 4}, [True, False, False, False]),
    ],
)
def test_layers(moe: dict[str, Any], expected: list[bool]) -> None:
    assert _model(**moe).moe_layers == expected
    assert load_model(SIZES).moe_layers == [False] * 4


@pytest.mark.parametrize(
    ("moe", "whole", "active"),
    [
        ({}, 8 * 3 * 64 * 96, 3 * 64 * 96),
        ({"top_k": 2, "ffn": 24, "shared_ffn": 48}, 8 * 3 * 64 * 24 + 3 * 64 * 48, 2 * 3 * 64 * 24 + 3 * 64 * 48),
    ],
)
def test_parameters(moe: dict[str, Any], whole: int, active: int) -> None:
    dense = load_model(SIZES).parameters(100) - 4 * 3 * 64 * 96
    router = 64 * 8
    assert _model(**moe).parameters(100) == dense + 4 * (router + whole)
    assert _model(**moe).parameters(100, active=True) == dense + 4 * (router + active)
    assert _model(**moe, first_dense=3).parameters(100) == dense + 3 * 3 * 64 * 96 + router + whole


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"top_k": 9}, "model.moe.top_k: 9 is more than the 8 experts: take at most that many"),
        ({"groups": 3}, "model.moe.groups: 3 does not divide experts, which is 8"),
        ({"groups": 4, "groups_kept": 2}, "model.moe.groups_kept: 2 must be at most groups (4) and divide top_k (1)"),
        ({"groups": 8, "top_k": 2}, "model.moe.top_k: 2 from 1 groups is more than the 1 of each"),
        ({"groups": 2, "balance": {"kind": "sinkhorn"}}, "model.moe.groups: 2: Sinkhorn's bias balances all experts"),
        ({"renormalise": True}, "model.moe.renormalise: true leaves a single expert no weight to learn from"),
        ({"renormalise": True, "score": "sigmoid"}, "model.moe.renormalise: true leaves a single expert"),
        ({"first_dense": 4}, "model.moe.first_dense: 4 leaves no layer with experts; model.layers is 4"),
        ({"balance": {"kind": "sinkhorn", "rule": "neox3", "warm_start": False}}, "model.moe.balance.scope: data:"),
        ({"balance": {"kind": "sinkhorn", "rule": "megatron", "scope": "rank"}}, "model.moe.balance.warm_start: true:"),
        ({"balance": {"kind": "penalties"}}, "did you mean 'penalty'?"),
        ({"expert": 8}, "model.moe.expert: unknown key; did you mean 'model.moe.experts'?"),
    ],
)
def test_wrong_experts(moe: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _model(**moe)
    assert message in str(caught.value)


def test_experts_have_no_biases() -> None:
    with pytest.raises(ConfigError, match=r"model\.bias: true: experts have no biases"):
        load_model({**SIZES, "bias": True, "moe": {"experts": 8}})


@pytest.mark.parametrize(
    ("parallel", "ranks", "message"),
    [
        ({"expert": 3}, 3, "parallel.expert: 3 does not divide model.moe.experts (8): take 2 or 4"),
        ({"expert": 4}, 2, "parallel.expert: 4 does not divide the 2 ranks of a pipeline stage: take 2"),
        ({"expert": 2, "pipeline": 2}, 2, "parallel.expert: 2 does not divide the 1 ranks of a pipeline stage: take 1"),
        ({"tensor": 2}, 2, "parallel.sequence: false: a model with experts needs sequence parallelism"),
    ],
)
def test_wrong_layouts(parallel: dict[str, Any], ranks: int, message: str) -> None:
    run = run_from_mapping({**plain_run(), "model": {**SIZES, "moe": {"experts": 8}}, "parallel": parallel})
    with pytest.raises(LayoutError) as caught:
        check_layout(run, ranks, 257)
    assert message in str(caught.value)


def test_tensor_parallelism_divides_what_it_splits() -> None:
    moe = {"experts": 8, "top_k": 2, "ffn": 25, "shared_ffn": 26}
    parallel = {"tensor": 4, "sequence": True}
    run = run_from_mapping({**plain_run(), "model": {**SIZES, "ffn": 97, "moe": moe}, "parallel": parallel})
    with pytest.raises(LayoutError, match=r"parallel\.tensor: 4 does not divide model\.moe\.shared_ffn \(26\): take 2"):
        check_layout(run, 4, 257)


@pytest.mark.parametrize(
    ("moe", "freeze", "refused"),
    [
        ({}, ["attention", "router", "experts"], True),
        ({}, ["attention", "mlp"], False),
        ({"shared_ffn": 8}, ["attention", "router", "experts"], False),
        ({"first_dense": 1}, ["attention", "router", "experts"], False),
        ({"first_dense": 1}, ["attention", "mlp", "router", "experts"], True),
    ],
)
def test_something_is_left_to_train(moe: dict[str, Any], freeze: list[str], refused: bool) -> None:
    optim = {"peak_lr": 1e-3, "freeze": ["embeddings", "output", "norms", *freeze]}
    mapping = {**plain_run(), "model": {**SIZES, "moe": {"experts": 8, **moe}}, "optim": optim}
    if not refused:
        run_from_mapping(mapping)
        return
    with pytest.raises(ConfigError, match=r"optim\.freeze: nothing is left to train"):
        run_from_mapping(mapping)


def test_a_dense_model_has_no_experts_to_share() -> None:
    run = run_from_mapping({**plain_run(), "model": SIZES, "parallel": {"expert": 2}})
    with pytest.raises(LayoutError, match=r"parallel\.expert: 2 ranks are to share experts, but the model has none"):
        check_layout(run, 2, 257)
