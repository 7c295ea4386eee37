"""Rounded activations: a loop over tokens, and the gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from megacpt.quant.activations import round_tokens

ROWS = arrays.arrays(
    np.float32,
    (3, 7),
    elements=st.one_of(st.floats(-8, 8, width=32), st.sampled_from([0.0, 1e-45, 1e-6, 1e30, -1e30])),
)


@settings(max_examples=80, deadline=None)
@given(rows=ROWS)
def test_int8_is_the_definition(rows: Any) -> None:
    found = round_tokens(torch.from_numpy(rows), "int8").numpy()
    for row, out in zip(rows, found, strict=True):
        scale = max(np.abs(row).max(), np.float32(1e-5)) / np.float32(127)
        assert [value * 1.0 for value in out] == [np.float32(round(float(x / scale))) * scale for x in row]
        assert np.abs(out - row).max() <= scale * np.float32(0.5001)


def _nearest_e4m3(value: float) -> float:
    """The nearest float8 e4m3 of a value up to 448, halves going to even."""
    levels = [m * 2.0**e for e in range(-9, 6) for m in range(16)]  # subnormals are multiples of 2^-9
    size = abs(value)
    best = min(
        levels, key=lambda level: (abs(level - size), (level / 2 ** (np.floor(np.log2(max(level, 2**-6))) - 3)) % 2)
    )
    return float(np.copysign(best, value))


@settings(max_examples=30, deadline=None)
@given(rows=ROWS)
def test_fp8_is_the_definition(rows: Any) -> None:
    found = round_tokens(torch.from_numpy(rows), "fp8").numpy()
    for row, out in zip(rows, found, strict=True):
        scale = max(np.abs(row).max(), np.float32(1e-5)) / np.float32(448)
        wanted = [np.float32(_nearest_e4m3(min(max(float(x / scale), -448), 448))) * scale for x in row]
        assert [float(x) for x in out] == [float(x) for x in wanted]


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_passes_straight_through(form: Any, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    grad = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    out = round_tokens(x, form)
    out.backward(grad)
    assert out.dtype == dtype
    assert not torch.equal(out, x)
    assert x.grad is not None
    assert torch.equal(x.grad, grad)


def test_no_form_changes_nothing() -> None:
    x = torch.randn(2, 3)
    assert round_tokens(x, "none") is x
