"""Norms and the scaling of rotary frequencies against their formulas."""

from __future__ import annotations

import math
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config.rope import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from megacpt.model.norm import NORMS, LayerNorm, RMSNorm
from megacpt.model.rope import attention_factor, scale_frequencies


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


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_layer_norm(dtype: torch.dtype, error: float) -> None:
    draw = torch.Generator().manual_seed(2)
    x, weight, bias = (torch.randn(shape, generator=draw) for shape in ((7, 3, 40), (40,), (40,)))
    norm = LayerNorm(_config(dtype), 40, 0.1)
    assert (norm.weight.tolist(), norm.bias.tolist()) == ([1.0] * 40, [0.0] * 40)
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    given_x, scale, shift = (part.to(dtype).double().numpy() for part in (5 * x + 2, weight, bias))
    centred = given_x - given_x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.1) * scale + shift
    np.testing.assert_allclose(norm((5 * x + 2).to(dtype)).detach().double().numpy(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("norm", NORMS.values())
def test_its_weights_carry_the_mark_of_sequence_parallelism(norm: Any, sequence: bool) -> None:
    marks: list[Any] = [parameter.sequence_parallel for parameter in norm(_config(sequence=sequence), 8).parameters()]
    assert set(marks) == {sequence}


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
    found = scale_frequencies(frequencies, RopeConfig(scaling=scaling))
    expected = [_llama3(float(frequency), scaling) for frequency in frequencies]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_llama3_scaling_has_all_three_parts() -> None:
    """With the published numbers the fast frequencies stay, the slow ones are divided, and some lie between."""
    frequencies = 5e5 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    ratio = (scale_frequencies(frequencies, RopeConfig(scaling=Llama3Scaling(kind="llama3"))) / frequencies).tolist()
    assert ratio == sorted(ratio, reverse=True)
    kept, stretched = ratio.count(1.0), sum(value == pytest.approx(1 / 8) for value in ratio)
    # 8192 positions hold 4 turns of a frequency of 2 pi / 2048, and 1 turn of one of 2 pi / 8192.
    assert kept == sum(float(f) >= 2 * math.pi / 2048 for f in frequencies)
    assert stretched == sum(float(f) <= 2 * math.pi / 8192 for f in frequencies)
    assert 1 <= len(ratio) - kept - stretched <= 8


@given(st.floats(1, 64))
def test_linear_scaling(factor: float) -> None:
    frequencies = torch.tensor([1.0, 0.1, 0.003], dtype=torch.float64)
    found = scale_frequencies(frequencies, RopeConfig(scaling=LinearScaling(kind="linear", factor=factor)))
    np.testing.assert_allclose(found.numpy(), [1 / factor, 0.1 / factor, 0.003 / factor])


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@given(
    st.floats(1, 64),
    st.integers(64, 131072),
    st.sampled_from([1e4, 1e6]),
    st.sampled_from([32, 64, 128]),
    st.tuples(st.floats(0.5, 2), st.floats(0.1, 60)),
    st.one_of(st.just((1.0, 0.0)), st.tuples(st.floats(0.1, 2), st.floats(0.1, 2))),
)
def test_yarn_is_that_of_transformers(
    factor: float, length: int, base: float, dims: int, betas: tuple[float, float], mscales: tuple[float, float]
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slow, fast = betas[0], betas[0] + betas[1]
    theirs = {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": factor,
        "original_max_position_embeddings": length,
        "beta_fast": fast,
        "beta_slow": slow,
        **({} if mscales[1] == 0 else {"mscale": mscales[0], "mscale_all_dim": mscales[1]}),
    }
    config = LlamaConfig(head_dim=dims, max_position_embeddings=length, rope_parameters=theirs)
    expected, attention = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    scaling = YarnScaling(
        kind="yarn",
        factor=factor,
        original_length=length,
        beta_fast=fast,
        beta_slow=slow,
        mscale=mscales[0],
        mscale_all_dim=mscales[1],
    )
    frequencies = base ** -(torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    found = scale_frequencies(frequencies, RopeConfig(base=base, scaling=scaling))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=3e-6)
    assert attention_factor(scaling) == pytest.approx(attention, rel=1e-12)


def test_yarn_by_hand() -> None:
    """Of 64 frequencies the fast ones stay, the slow ones are divided by 4; scores are sharpened."""
    frequencies = 1e4 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    scaling = YarnScaling(kind="yarn", factor=4, original_length=4096)
    ratio = (scale_frequencies(frequencies, RopeConfig(scaling=scaling)) / frequencies).tolist()
    turns = [4096 * float(frequency) / (2 * math.pi) for frequency in frequencies]
    assert all(r == 1 for r, n in zip(ratio, turns, strict=True) if n > 1.2 * 32)
    assert all(r == pytest.approx(1 / 4) for r, n in zip(ratio, turns, strict=True) if n < 1 / 1.2)
    assert ratio == sorted(ratio, reverse=True)
    assert attention_factor(scaling) == pytest.approx(0.1 * math.log(4) + 1)
    assert attention_factor(LinearScaling(kind="linear", factor=4)) == attention_factor(None) == 1


def test_no_scaling() -> None:
    frequencies = torch.tensor([1.0, 0.1])
    assert scale_frequencies(frequencies, RopeConfig()) is frequencies
