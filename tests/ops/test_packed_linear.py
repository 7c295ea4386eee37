"""Products with packed ternary matrices: the definition against dense products, the kernels against the definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megacpt.ops import packed_linear_cpu, packed_linear_reference
from megacpt.ops.native import library
from megacpt.ops.packed_linear import PACKED_LINEAR, Activations, pack_matrix, packed_linear
from megacpt.ops.packed_linear_reference import round_activations
from megacpt.quant.activations import round_tokens

VARIANTS = range(packed_linear_cpu.best_variant() + 1)
MODES: tuple[Activations, ...] = ("float", "int8")
SCALES = (0.0, 1e-38, 1e-29, 1.0, 1e30, math.inf, math.nan)  # of single activations, among ordinary ones
EPS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.fixture(scope="module", params=VARIANTS, ids=[packed_linear_cpu.VARIANTS[isa] for isa in VARIANTS])
def kernel(request: pytest.FixtureRequest) -> packed_linear_cpu.CompiledLinear:
    """The compiled functions, on each instruction set that this processor has."""
    return packed_linear_cpu.CompiledLinear(library(), request.param)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Codes and scales of odd sizes, by row and column blocks; some scales are 0."""
    blocks = draw(st.sampled_from((1, 1, 2, 3, 8)))
    width = draw(st.one_of(st.integers(1, 40), st.sampled_from((127, 128, 129, 255, 256, 257, 384, 600))))
    row_blocks, rows = draw(st.sampled_from((1, 2, 5))), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    codes = torch.randint(-1, 2, (row_blocks * rows, blocks * width), generator=generator, dtype=torch.int8)
    return codes, torch.rand(row_blocks, blocks, generator=generator).sub_(0.1).clamp_(min=0)


def draw_x(codes: Tensor, tokens: int, seed: int, extreme: float | None) -> Tensor:
    """Activations, with rows or single ones of an extreme size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, codes.shape[1], generator=generator)
    if extreme is not None and tokens:
        x[seed % tokens, seed % codes.shape[1]] = extreme
        x[-1] *= extreme
    return x


def dense(codes: Tensor, scales: Tensor) -> Tensor:
    """The matrix in float64, block by block."""
    rows, width = codes.shape[0] // scales.shape[0], codes.shape[1] // scales.shape[1]
    return codes.double() * scales.double().kron(torch.ones(rows, width, dtype=torch.float64))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are the same, NaN where NaN is."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@settings(max_examples=60, deadline=None)
@given(matrix=matrices())
def test_packing_keeps_every_code(matrix: tuple[Tensor, Tensor]) -> None:
    codes, scales = matrix
    packed = pack_matrix(codes, scales)
    assert torch.equal(packed.codes(), codes)
    assert (packed.o, packed.i) == codes.shape
    assert packed.scales.shape == (codes.shape[0], scales.shape[1])


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("stride", [1, 32])
def test_every_group_of_four_codes(
    kernel: packed_linear_cpu.CompiledLinear, activations: Activations, stride: int
) -> None:
    groups = torch.tensor(list(itertools.product((-1, 0, 1), repeat=4)), dtype=torch.int8)
    codes = torch.zeros(81, 128, dtype=torch.int8)
    codes[:, 0 : 4 * stride : stride] = groups  # neighbours in memory, and those that share a byte
    found = kernel.packed_linear(torch.eye(128) * 127, pack_matrix(codes, torch.ones(1, 1)), activations)
    assert torch.equal(found.T, codes.float() * 127)


@settings(max_examples=40, deadline=None)
@given(
    matrix=matrices(),
    tokens=st.sampled_from((0, 1, 2, 3, 7, 8, 17)),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(tuple(EPS)),
)
def test_float_products_agree_with_dense_ones_in_float64(
    kernel: packed_linear_cpu.CompiledLinear,
    matrix: tuple[Tensor, Tensor],
    tokens: int,
    seed: int,
    dtype: torch.dtype,
) -> None:
    codes, scales = matrix
    x, packed = draw_x(codes, tokens, seed, None).to(dtype), pack_matrix(codes, scales)
    wanted = x.double() @ dense(codes, scales).T
    size = x.double().abs() @ dense(codes, scales).abs().T
    exact = packed_linear_reference.packed_linear(x.double(), packed, "float")
    torch.testing.assert_close(exact, wanted, atol=1e-12, rtol=1e-12)
    found = kernel.packed_linear(x, packed, "float")
    assert found.dtype is dtype
    assert ((found.double() - wanted).abs() <= EPS[dtype] * size).all()


@settings(max_examples=40, deadline=None)
@given(
    matrix=matrices(),
    tokens=st.sampled_from((1, 2, 3, 7, 8, 17)),
    seed=st.integers(0, 2**32),
    extreme=st.sampled_from((None, *SCALES)),
    dtype=st.sampled_from(tuple(EPS)),
)
def test_int8_products_are_those_of_the_definition_bit_by_bit(
    kernel: packed_linear_cpu.CompiledLinear,
    matrix: tuple[Tensor, Tensor],
    tokens: int,
    seed: int,
    extreme: float | None,
    dtype: torch.dtype,
) -> None:
    codes, scales = matrix
    x, packed = draw_x(codes, tokens, seed, extreme).to(dtype), pack_matrix(codes, scales)
    found = kernel.packed_linear(x, packed, "int8")
    assert same_bits(found, packed_linear_reference.packed_linear(x, packed, "int8"))
    integers, steps = round_activations(x.float(), scales.shape[1])
    width = codes.shape[1] // scales.shape[1]
    values = (integers.double() * steps.double().unsqueeze(-1)).flatten(2)[..., :width].flatten(1)
    wanted, size = values @ dense(codes, scales).T, values.abs() @ dense(codes, scales).abs().T
    known = size < 1e37  # beyond, sums in float32 may overflow where those in float64 do not
    assert (found.double() - wanted).abs()[known].le(EPS[dtype] * size[known] + 1e-7).all()


def test_activations_are_rounded_by_blocks_of_256_that_end_with_a_column_block() -> None:
    x = torch.arange(600, dtype=torch.float64)[None] - 100
    integers, scales = round_activations(x, 2)
    assert integers.shape == (1, 2, 2, 256)
    assert torch.equal(scales.flatten() * 127, torch.tensor([155.0, 199.0, 455.0, 499.0], dtype=torch.float64))
    whole = torch.cat([integers[0, 0, 0], integers[0, 0, 1, :44], integers[0, 1, 0], integers[0, 1, 1, :44]])
    steps = scales.flatten().repeat_interleave(torch.tensor([256, 44, 256, 44]))
    assert ((whole * steps - x[0]).abs() <= steps / 2 * (1 + 1e-12)).all()
    assert torch.equal(integers, integers.round())
    halves = round_activations(torch.tensor([[127.0, 0.5, 1.5, -2.5, 126.5]]), 1)[0].flatten()[:5]
    assert halves.tolist() == [127, 0, 2, -2, 126]


def test_what_becomes_of_extremes(kernel: packed_linear_cpu.CompiledLinear) -> None:
    packed = pack_matrix(torch.tensor([[1, 0, -1]] * 5, dtype=torch.int8), torch.ones(1, 1))
    x = torch.tensor(
        [[0.0, 0, 0], [1e-31, 1e-31, 0], [1, math.nan, 1], [math.inf, 1, 1], [1, math.inf, 1], [3e38, 0, 1]]
    )
    rounded = kernel.packed_linear(x, packed, "int8")[:, 0]
    assert rounded[:2].tolist() == [0, 0]
    assert rounded[2:5].isnan().all()
    assert rounded[5] == pytest.approx(3e38)
    plain = kernel.packed_linear(x, packed, "float")[:, 0]
    assert plain[[0, 1, 3, 5]].tolist() == pytest.approx([0, 1e-31, math.inf, 3e38])
    assert plain[[2, 4]].isnan().all()  # a zero code times infinity, as in a dense product


@settings(max_examples=30, deadline=None)
@given(
    matrix=matrices(), seed=st.integers(0, 2**32), extreme=st.sampled_from((None, *SCALES)), mode=st.sampled_from(MODES)
)
def test_instruction_sets_give_the_same_bits(
    kernel: packed_linear_cpu.CompiledLinear,
    matrix: tuple[Tensor, Tensor],
    seed: int,
    extreme: float | None,
    mode: Activations,
) -> None:
    x, packed = draw_x(matrix[0], 11, seed, extreme), pack_matrix(*matrix)
    assert same_bits(kernel.packed_linear(x, packed, mode), packed_linear_cpu.load().packed_linear(x, packed, mode))


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("tokens", [1, 21, 530])
def test_threads_and_the_company_of_a_token_change_no_bit(activations: Activations, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 2, (301, 1300), generator=generator, dtype=torch.int8)
    packed = pack_matrix(codes, torch.rand(7, 2, generator=generator))
    x = torch.randn(tokens, 1300, generator=generator)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(packed_linear(x, packed, activations))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    assert torch.equal(results[0][-1:], packed_linear(x[-1:], packed, activations))


@pytest.mark.parametrize("activations", MODES)
def test_activations_need_not_be_contiguous(activations: Activations) -> None:
    x, packed = torch.randn(300, 6), pack_matrix(torch.ones(2, 300, dtype=torch.int8), torch.ones(1, 1))
    assert torch.equal(packed_linear(x.T, packed, activations), packed_linear(x.T.clone(), packed, activations))


@pytest.mark.parametrize("activations", MODES)
def test_float64_and_the_reference_by_choice(activations: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-1, 2, (9, 700), generator=torch.Generator().manual_seed(3), dtype=torch.int8)
    packed, x = pack_matrix(codes, torch.full((3, 2), 0.5)), torch.randn(4, 700)
    native = packed_linear(x, packed, activations)
    assert PACKED_LINEAR.choose("cpu", torch.float32).backend == "cpu"
    torch.testing.assert_close(packed_linear(x.double(), packed, activations).float(), native, atol=0.3, rtol=0.01)
    monkeypatch.setenv("MEGACPT_KERNELS", "reference")
    torch.testing.assert_close(packed_linear(x, packed, activations), native, atol=1e-4, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(matrix=matrices(), seed=st.integers(0, 2**32), dtype=st.sampled_from((torch.float32, torch.bfloat16)))
def test_float8_is_the_rounding_of_training(matrix: tuple[Tensor, Tensor], seed: int, dtype: torch.dtype) -> None:
    packed = pack_matrix(*matrix)
    x = torch.randn(5, packed.i, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[3], x[4, 0] = 0, math.nan
    found = packed_linear(x, packed, "fp8")
    wanted = packed_linear(round_tokens(x.float(), "fp8").double(), packed)
    torch.testing.assert_close(found.double(), wanted, equal_nan=True, rtol=2.0**-8, atol=1e-4)
    assert not found[3].any()
    defined = packed_linear_reference.packed_linear(x.float(), packed, "fp8")
    torch.testing.assert_close(defined.double(), wanted, equal_nan=True, rtol=1e-5, atol=1e-4)


def test_what_does_not_fit_is_said() -> None:
    codes, one = torch.zeros(6, 8, dtype=torch.int8), torch.ones(1, 1)
    packed = pack_matrix(codes, one)
    with pytest.raises(ValueError, match=r"codes must be \[o, i\] int8"):
        pack_matrix(codes.float(), one)
    with pytest.raises(ValueError, match=r"codes must be \[o, i\] int8 and not empty"):
        pack_matrix(codes[:0], one)
    with pytest.raises(ValueError, match=r"scales must be \[R, C\] float32"):
        pack_matrix(codes, one.double())
    with pytest.raises(ValueError, match=r"scales \[4, 1\] do not divide a matrix \[6, 8\]"):
        pack_matrix(codes, torch.ones(4, 1))
    with pytest.raises(ValueError, match="these range from 0 to 2"):
        pack_matrix(torch.full((1, 1), 2, dtype=torch.int8).expand(6, 8).tril(), one)
    with pytest.raises(ValueError, match=r"x must be \[T, 8\] and floating point"):
        packed_linear(torch.zeros(2, 9), packed)
    with pytest.raises(ValueError, match="must be 'float', 'int8' or 'fp8', not 'fp4'"):
        packed_linear(torch.zeros(2, 8), packed, "fp4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no gradient and x requires one"):
        packed_linear(torch.zeros(2, 8, requires_grad=True), packed)
    with torch.no_grad():
        assert packed_linear(torch.zeros(2, 8, requires_grad=True), packed).shape == (2, 6)
    with pytest.raises(ValueError, match="x is on meta and the matrix on cpu"):
        packed_linear(torch.zeros(2, 8, device="meta"), packed)


@settings(max_examples=40, deadline=None)
@given(matrix=matrices(), tiled=st.sampled_from((None, False, True)))
def test_both_layouts_hold_the_codes(matrix: tuple[Tensor, Tensor], tiled: bool | None) -> None:
    packed = pack_matrix(*matrix, tiled)
    assert packed.tiled == bool(tiled)  # in units on the CPU, where nothing else is asked for
    assert torch.equal(packed.codes(), matrix[0])
    assert (packed.o, packed.i) == tuple(matrix[0].shape)
