"""Products with matrices of 16-bit floats: the kernels against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpt.ops import packed_linear_cpu
from megacpt.ops.half_linear import HALF_LINEAR, half_linear
from megacpt.ops.native import library

DTYPES = (torch.bfloat16, torch.float16)
VARIANTS = range(packed_linear_cpu.best_variant() + 1)


@pytest.fixture(scope="module", params=VARIANTS, ids=[packed_linear_cpu.VARIANTS[isa] for isa in VARIANTS])
def kernel(request: pytest.FixtureRequest) -> packed_linear_cpu.CompiledLinear:
    """The compiled functions, on each instruction set that this processor has."""
    return packed_linear_cpu.CompiledLinear(library(), request.param)


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.sampled_from((0, 1, 2, 3, 4, 7, 9)),
    o=st.integers(1, 40),
    i=st.one_of(st.integers(1, 70), st.sampled_from((384, 1000))),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_agrees_with_float64_on_every_instruction_set_with_the_same_bits(
    kernel: packed_linear_cpu.CompiledLinear, tokens: int, o: int, i: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(tokens, i, generator=generator), torch.randn(o, i, generator=generator).to(dtype)
    found = kernel.half_linear(x, weight)
    assert ((found - x.double() @ weight.double().T).abs() <= 2e-6 * (x.abs() @ weight.float().abs().T)).all()
    assert torch.equal(found, packed_linear_cpu.load().half_linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_is_read_as_torch_reads_it(kernel: packed_linear_cpu.CompiledLinear, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    found = kernel.half_linear(torch.ones(1, 1), every[:, None])[0]  # read one by one
    assert torch.equal(found.isnan(), every.isnan())
    assert torch.equal(found.nan_to_num(), every.float().nan_to_num())
    whole = kernel.half_linear(torch.eye(16)[3:4], torch.where(every.isfinite(), every, 0).view(-1, 16))[0]
    assert torch.equal(whole, torch.where(every.isfinite(), every, 0).view(-1, 16)[:, 3].float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 9])
def test_threads_and_the_company_of_a_token_change_no_bit(dtype: torch.dtype, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(tokens, 700, generator=generator), torch.randn(1031, 700, generator=generator).to(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(half_linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    assert torch.equal(results[0][-1:], half_linear(x[-1:], weight))


def test_extremes_and_strides() -> None:
    x, weight = torch.tensor([[math.inf, 1.0], [math.nan, 1.0], [1.0, 1.0]]), torch.ones(2, 3).to(torch.bfloat16).T
    found = half_linear(x, weight)
    assert found[0].tolist() == [math.inf] * 3
    assert found[1].isnan().all()
    assert found[2].tolist() == [2.0] * 3


def test_the_reference_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 50), torch.randn(8, 50).half()
    native = half_linear(x, weight)
    assert HALF_LINEAR.choose("cpu", torch.float16).backend == "cpu"
    monkeypatch.setenv("MEGACPT_KERNELS", "reference")
    torch.testing.assert_close(half_linear(x, weight), native)


def test_what_does_not_fit_is_said() -> None:
    x, weight = torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"weight must be \[o, i\] bfloat16 or float16"):
        half_linear(x, weight.float())
    with pytest.raises(ValueError, match=r"x must be \[T, 4\] float32"):
        half_linear(x.bfloat16(), weight)
    with pytest.raises(ValueError, match="x is on meta and the weight on cpu"):
        half_linear(x.to("meta"), weight)
    with pytest.raises(ValueError, match="has no gradient"):
        half_linear(x, weight.requires_grad_())
