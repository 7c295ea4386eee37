"""RMSNorm and the scaling of rotary frequencies against their formulas."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config.model import LinearScaling, Llama3Scaling
from megacpt.model.norm import RMSNorm
from megacpt.model.rope import scale_frequencies


def _config(dtype: torch.dtype = torch.float32, sequence: bool = False) -> Any:
    return SimpleNamespace(params_dtype=dtype, sequence_parallel=sequence, use_cpu_initialization=False)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rms_norm(dtype: torch.dtype, error: float, eps: float) -> None:
    draw = torch.Generator().manual_seed(2)
    x, weight = torch.randn(7, 3, 40, generator=draw) * 5, torch.randn(40, generator=draw)
    norm = RMSNorm(_config(dtype), 40, eps)
    assert torch.equal(norm.weight, torch.ones(40, dtype=dtype))
    with torch.no_grad():
        norm.weight.copy_(weight)
    rounded, scale = x.to(dtype).double().numpy(), weight.to(dtype).double().numpy()
    expected = rounded / np.sqrt((rounded**2).mean(-1, keepdims=True) + eps) * scale
    np.testing.assert_allclose(norm(x.to(dtype)).detach().double().numpy(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("sequence", [False, True])
def test_its_weight_carries_the_mark_of_sequence_parallelism(sequence: bool) -> None:
    weight: Any = RMSNorm(_config(sequence=sequence), 8).weight
    assert weight.sequence_parallel is sequence


def _llama3(frequency: float, s: Llama3Scaling) -> float:
    """By wavelength, as the published configuration describes it."""
    wavelength = 2 * math.pi / frequency
    if wavelength < s.original_length / s.high_freq_factor:
        return frequency
    if wavelength > s.original_length / s.low_freq_factor:
        return frequency / s.factor
    smooth = (s.original_length / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return (1 - smooth) * frequency / s.factor + smooth * frequency


@given(
    st.floats(1, 64),
    st.floats(0.5, 2),
    st.floats(0.1, 8),
    st.integers(64, 16384),
    st.sampled_from([1e4, 5e5]),
)
def test_llama3_scaling(factor: float, low: float, more: float, length: int, base: float) -> None:
    scaling = Llama3Scaling(
        kind="llama3", factor=factor, low_freq_factor=low, high_freq_factor=low + more, original_length=length
    )
    frequencies = base ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    found = scale_frequencies(frequencies, scaling)
    expected = [_llama3(float(frequency), scaling) for frequency in frequencies]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_llama3_scaling_has_all_three_parts() -> None:
    """With the published numbers the fast frequencies stay, the slow ones are divided, and some lie between."""
    frequencies = 5e5 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    ratio = (scale_frequencies(frequencies, Llama3Scaling(kind="llama3")) / frequencies).tolist()
    assert ratio == sorted(ratio, reverse=True)
    kept, stretched = ratio.count(1.0), sum(value == pytest.approx(1 / 8) for value in ratio)
    # 8192 positions hold 4 turns of a frequency of 2 pi / 2048, and 1 turn of one of 2 pi / 8192.
    assert kept == sum(float(f) >= 2 * math.pi / 2048 for f in frequencies)
    assert stretched == sum(float(f) <= 2 * math.pi / 8192 for f in frequencies)
    assert 1 <= len(ratio) - kept - stretched <= 8


@given(st.floats(1, 64))
def test_linear_scaling(factor: float) -> None:
    frequencies = torch.tensor([1.0, 0.1, 0.003], dtype=torch.float64)
    found = scale_frequencies(frequencies, LinearScaling(kind="linear", factor=factor))
    np.testing.assert_allclose(found.numpy(), [1 / factor, 0.1 / factor, 0.003 / factor])


def test_no_scaling() -> None:
    frequencies = torch.tensor([1.0, 0.1])
    assert scale_frequencies(frequencies, None) is frequencies
