"""Grids against what a person would write down: a loop over weights, in scalars."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from megacpt.config import QuantiseConfig
from megacpt.quant.grids import make_grid
from megacpt.quant.hadamard import gaussian_clip, transform
from megacpt.quant.matrix import quantise_matrix
from megacpt.quant.scales import Blocks, expand

FLOATS = st.one_of(
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 5e-6, -5e-6, 1e-5, 3e38, -3e38]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
MATRICES = arrays.arrays(np.float32, st.sampled_from([(4, 8), (8, 4), (12, 4)]), elements=FLOATS)
SCOPES: dict[str, dict[str, Any]] = {
    "tensor": {},
    "shard": {"scope": "shard", "shards": 2},
    "group": {"scope": "group", "group": 4},
}


def _config(grid: str, scope: str = "tensor", **changes: Any) -> QuantiseConfig:
    scale = {**SCOPES[scope], **changes.pop("scale", {})}
    return QuantiseConfig.model_validate({"grid": grid, "scale": scale, **changes})


def _blocks(shape: tuple[int, int], scope: str, split_dim: int, halves: int) -> Iterator[list[tuple[int, int]]]:
    """The places of each block of a matrix, block after block."""
    o, i = shape
    if scope == "group":
        yield from ([(r, c + k) for k in range(4)] for r in range(o) for c in range(0, i, 4))
        return
    parts = 2 if scope == "shard" else 1
    for part in range(parts):
        if split_dim == 1:
            yield [(r, c) for r in range(o) for c in range(part * i // parts, (part + 1) * i // parts)]
        else:
            half, rows = o // halves, o // halves // parts
            yield [(h * half + part * rows + r, c) for h in range(halves) for r in range(rows) for c in range(i)]


def _float32(value: float) -> set[float]:
    """What a sum of float64 may round to: its order may decide its last bit, and that one where float32 has a tie."""
    return {float(np.float32(min(value * (1 + e), float(np.finfo(np.float32).max)))) for e in (-1e-15, 0, 1e-15)}


def _gamma(weights: list[float], rule: str) -> set[float]:
    """The scale of TriLM (table 1 of arXiv 2407.12327), or that of BitNet b1.58."""
    mean = math.fsum(abs(float(w)) for w in weights) / len(weights)
    return _float32(mean + 1e-5 if rule == "add" else max(mean, 1e-5))


def _code(weight: float, gamma: float) -> int:
    quotient = np.float32(weight) / np.float32(gamma)
    return round(float(min(max(quotient, np.float32(-1)), np.float32(1))))  # Python rounds halves to even


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("split_dim", "halves"), [(0, 1), (0, 2), (1, 1)])
@settings(max_examples=40, deadline=None)
@given(matrix=MATRICES, rule=st.sampled_from(["add", "clamp"]))
def test_ternary_is_the_definition(scope: str, split_dim: Any, halves: int, matrix: Any, rule: str) -> None:
    weight = torch.from_numpy(matrix)
    found = quantise_matrix(weight, _config("ternary", scope, scale={"rule": rule}), split_dim, halves)
    scales = expand(found.scales, *weight.shape)
    for places in _blocks(matrix.shape, scope, split_dim, halves):
        (gamma,) = {float(scales[place]) for place in places}
        assert gamma in _gamma([matrix[place] for place in places], rule)
        assert [int(found.codes[place]) for place in places] == [_code(matrix[place], gamma) for place in places]
    assert torch.equal(found.dense(), found.codes * scales)


def test_a_tie_goes_to_zero_and_the_next_number_does_not() -> None:
    gamma = np.float32(1e-5)
    half = gamma / np.float32(2)
    row = [half, -half, np.nextafter(half, np.float32(1)), np.nextafter(-half, np.float32(-1)), 0, 1e-45]
    config = _config("ternary", scale={"rule": "clamp"})
    found = quantise_matrix(torch.tensor([row]), config, 0)
    assert found.scales.item() == gamma
    assert found.codes.tolist() == [[0, 0, 1, -1, 0, 0]]


@pytest.mark.parametrize("rule", ["add", "clamp"])
def test_a_matrix_of_zeros_has_the_least_scale(rule: str) -> None:
    found = quantise_matrix(torch.zeros(4, 4), _config("ternary", scale={"rule": rule}), 0)
    assert found.scales.item() == np.float32(1e-5)
    assert not found.dense().any()


@pytest.mark.parametrize("form", ["float16", "bfloat16"])
def test_scales_are_rounded_before_weights_are_divided(form: str) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    found = quantise_matrix(weight, _config("ternary", scale={"format": form}), 0)
    kept = found.scales.to(getattr(torch, form))
    exact = quantise_matrix(weight, _config("ternary"), 0).scales
    assert torch.equal(kept.float(), found.scales)
    assert torch.equal(exact.to(kept.dtype), kept)
    assert torch.equal(found.codes, (weight / kept.float()).clamp(-1, 1).round().to(torch.int8))


def test_a_scale_beyond_its_format_is_the_largest_of_it() -> None:
    found = quantise_matrix(torch.tensor([[1e30, -1e30, 0, 0]]), _config("ternary", scale={"format": "float16"}), 0)
    assert found.scales.item() == 65504
    assert found.codes.tolist() == [[1, -1, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(matrix=MATRICES)
def test_a_ternary_matrix_keeps_its_codes(matrix: Any) -> None:
    config = _config("ternary")
    found = quantise_matrix(torch.from_numpy(matrix), config, 0)
    assert torch.equal(quantise_matrix(found.dense(), config, 0).codes, found.codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_ternary_in_other_formats(dtype: torch.dtype) -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = quantise_matrix(weight, _config("ternary"), 0)
    gamma = (weight.double().abs().mean() + 1e-5).float()
    working = torch.float64 if dtype is torch.float64 else torch.float32
    codes = (weight.to(working) / gamma.to(working)).clamp(-1, 1).round()
    assert found.scales.item() == pytest.approx(float(gamma), rel=1e-7)
    assert torch.equal(found.codes, codes.to(torch.int8))
    assert torch.equal(found.dense(dtype), (codes * gamma.to(working)).to(dtype))


@pytest.mark.parametrize("scope", SCOPES)
@settings(max_examples=40, deadline=None)
@given(matrix=MATRICES)
def test_binary_is_the_definition(scope: str, matrix: Any) -> None:
    found = quantise_matrix(torch.from_numpy(matrix), _config("binary", scope), 1)
    scales = expand(found.scales, *matrix.shape)
    for places in _blocks(matrix.shape, scope, 1, 1):
        weights = [float(matrix[place]) for place in places]
        alpha = math.fsum(map(abs, weights)) / len(weights)
        mean = float(torch.tensor(weights, dtype=torch.float64).sum() / len(weights))
        assert float(scales[places[0]]) == pytest.approx(float(np.float32(alpha)), rel=1e-7)
        # Cancelled sums depend on their order, and means are kept in float32, whose smallest number is 1.4e-45.
        near = [abs(w - mean) < 1e-6 * alpha + 1.4e-45 for w in weights]
        codes = [int(found.codes[place]) for place in places]
        assert all(skip or code == (1 if w >= mean else -1) for skip, code, w in zip(near, codes, weights, strict=True))


def test_binary_puts_the_mean_itself_above() -> None:
    assert quantise_matrix(torch.full((2, 2), 0.5), _config("binary"), 0).codes.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("scope", SCOPES)
@settings(max_examples=40, deadline=None)
@given(matrix=MATRICES, bits=st.integers(2, 8))
def test_int_is_the_definition(scope: str, matrix: Any, bits: int) -> None:
    found = quantise_matrix(torch.from_numpy(matrix), _config("int", scope, bits=bits), 0)
    scales = expand(found.scales, *matrix.shape)
    top = 2 ** (bits - 1) - 1
    for places in _blocks(matrix.shape, scope, 0, 1):
        scale = np.float32(max(abs(float(matrix[place])) for place in places) / top)
        assert {float(scales[place]) for place in places} == {float(scale)}
        codes = [0 if scale == 0 else round(float(matrix[place] / scale)) for place in places]
        assert [int(found.codes[place]) for place in places] == [min(max(code, -top), top) for code in codes]


@pytest.mark.parametrize("bits", range(1, 8))
def test_the_range_of_quest_is_the_best_for_a_gaussian(bits: int) -> None:
    steps = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881}  # Max 1960, table II
    step = 2 * gaussian_clip(bits) / (2**bits - 1)
    if bits in steps:
        assert step == pytest.approx(steps[bits], abs=3e-4)

    def error(size: float) -> float:
        grid = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
        level = ((grid / size).floor() + 0.5).clamp(-(2**bits - 1) / 2, (2**bits - 1) / 2) * size
        return float(((grid - level) ** 2 * torch.exp(-(grid**2) / 2)).sum())

    assert error(step) < min(error(step * 0.99), error(step * 1.01))


def _hadamard(length: int) -> Tensor:
    signs = [[(-1) ** (r & c).bit_count() for c in range(length)] for r in range(length)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(length)


@pytest.mark.parametrize("length", [2, 8, 32])
def test_the_transform_is_hadamards_and_its_own_inverse(length: int) -> None:
    x = torch.randn(3, 2 * length, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = transform(x, length)
    assert torch.allclose(found, (x.view(3, 2, length) @ _hadamard(length)).view(3, -1), atol=1e-14)
    assert torch.allclose(transform(found, length), x, atol=1e-14)


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_quest_is_the_definition(bits: int) -> None:
    group, config = 8, _config("quest", bits=bits, scale={"scope": "group", "group": 8})
    weight = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    found = quantise_matrix(weight, config, 0)
    for r in range(4):
        for c in range(2):
            x = _hadamard(group) @ weight[r, c * group : (c + 1) * group]
            half_step = np.float32(float(x.square().mean().sqrt()) * gaussian_clip(bits) / (2**bits - 1))
            assert float(found.scales[r, c]) == pytest.approx(float(half_step), rel=1e-6)
            step = 2 * float(found.scales[r, c])
            levels = [(k + 0.5) * step for k in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
            nearest = torch.tensor(
                [min(levels, key=lambda level: abs(level - float(value))) for value in x], dtype=torch.float64
            )
            dense = found.dense(torch.float64)[r, c * group : (c + 1) * group]
            assert torch.allclose(dense, _hadamard(group) @ nearest, atol=1e-12)


def test_quest_trusts_what_is_within_half_a_step() -> None:
    config = _config("quest", bits=2, scale={"scope": "group", "group": 8})
    weight = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grad = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = quantise_matrix(weight, config, 0)
    blocks = Blocks.of((4, 16), config.scale, 0)
    hadamard = torch.block_diag(_hadamard(8), _hadamard(8))
    latent = weight.clone().requires_grad_()
    x = latent @ hadamard
    level = found.codes * expand(found.scales, 4, 16).double()
    trusted = (x - level).abs() <= expand(found.scales, 4, 16)  # half a step
    flow = (x * trusted) @ hadamard
    (flow + (found.dense(torch.float64) - flow).detach()).backward(grad)
    assert latent.grad is not None
    assert 0 < int(trusted.sum()) < trusted.numel()
    assert torch.allclose(make_grid(config).gradient(grad, weight, found.scales, blocks), latent.grad, atol=1e-12)


@pytest.mark.parametrize("grid", ["ternary", "binary", "int", "quest"])
def test_every_expert_has_scales_of_its_own(grid: str) -> None:
    changes: dict[str, Any] = {"bits": 3} if grid in ("int", "quest") else {}
    scope = "group" if grid == "quest" else "shard"
    config = _config(grid, scope, **changes)
    experts = (
        torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(4)) * torch.tensor([1.0, 5.0, 0.1])[:, None, None]
    )
    together = quantise_matrix(experts, config, 0, 2)
    for e, weight in enumerate(experts):
        alone = quantise_matrix(weight, config, 0, 2)
        assert torch.equal(together.codes[e], alone.codes)
        assert torch.equal(together.scales[e], alone.scales)
        assert torch.equal(together.dense()[e], alone.dense())
