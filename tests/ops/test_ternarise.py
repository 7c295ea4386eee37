"""Ternary quantisation: the definition against scalar arithmetic, the kernels against the definition, bit by bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megacpt.ops import ternarise_cpu, ternarise_reference
from megacpt.ops.native import INSTRUCTION_SETS, instruction_set, library
from megacpt.ops.ternarise import block_abs_sums, joined_rows, ternarise, unpack
from megacpt.ops.ternarise_reference import Blocks, signs
from megacpt.quant.packing import pack_trits4, unpack_trits4
from tests.ops.ternary import TernaryList, same_bits, ternary_lists

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=range(instruction_set() + 1), ids=INSTRUCTION_SETS[: instruction_set() + 1])
def kernel(request: pytest.FixtureRequest) -> ternarise_cpu.CompiledTernary:
    """The compiled functions, on each instruction set that this processor has."""
    return ternarise_cpu.CompiledTernary(library(), request.param)


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.floats(width=32) | st.sampled_from((0.25, -0.25, 0.5, 1e-45, -0.0)), min_size=1, max_size=20),
    scale=st.floats(2.0**-149, 2.0**100, width=32) | st.sampled_from((0.5, 1.0, 1e-45)),
)
def test_the_definition_is_that_of_scalars(weights: list[float], scale: float) -> None:
    weight, out, packed = torch.tensor([weights]), torch.ones(1, len(weights)), torch.empty(1, -(-len(weights) // 4))
    packed = packed.to(torch.uint8)
    ((zeros, flips),) = ternarise_reference.ternarise(
        [weight], [torch.tensor([[scale]])], [out], [1], [packed]
    ).tolist()
    with np.errstate(all="ignore"):
        quotients = [float(np.float32(w) / np.float32(scale)) for w in weights]
    codes = [0 if math.isnan(q) else round(max(-1.0, min(1.0, q))) for q in quotients]
    wanted = [
        math.nan if math.isnan(w) else code * torch.tensor(scale).item() for w, code in zip(weights, codes, strict=True)
    ]
    assert same_bits(out, torch.tensor([wanted]))
    assert (zeros, flips) == (codes.count(0), len(codes) - codes.count(1))
    assert unpack_trits4(packed, len(weights)).tolist() == [codes]


@settings(max_examples=60, deadline=None)
@given(case=ternary_lists())
def test_kernels_agree_with_the_definition(kernel: ternarise_cpu.CompiledTernary, case: TernaryList) -> None:
    sums = kernel.block_abs_sums(case.weights, case.blocks)
    for found, wanted in zip(sums, ternarise_reference.block_abs_sums(case.weights, case.blocks), strict=True):
        assert same_bits(found, wanted)
    (mine, *found), (theirs, *wanted) = (case.ternarised(functions) for functions in (kernel, ternarise_reference))
    assert torch.equal(mine, theirs)
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))


@settings(max_examples=60, deadline=None)
@given(case=ternary_lists())
def test_codes_without_values_are_the_same_codes(kernel: ternarise_cpu.CompiledTernary, case: TernaryList) -> None:
    wanted = case.ternarised(ternarise_reference)
    for functions in (kernel, ternarise_reference):
        counts, *packed = case.packed_alone(functions)
        assert all(map(torch.equal, packed, wanted[1 + len(case.weights) :]))
        assert torch.equal(counts[:, 0], wanted[0][:, 0])
        assert counts.sum(1).tolist() == [weight.numel() for weight in case.weights]  # all that is not 0 is a flip


@settings(max_examples=60, deadline=None)
@given(case=ternary_lists(), infinite=st.booleans())
def test_codes_become_values(kernel: ternarise_cpu.CompiledTernary, case: TernaryList, infinite: bool) -> None:
    for former, at, scales in zip(case.former, case.blocks, case.scales, strict=True):
        if infinite:
            scales[..., 0, 0] = math.inf
        packed = pack_trits4(signs(former))
        spread = scales[..., None, :, None, :, None]
        view = (at.halves, at.rows, former.shape[-2] // (at.halves * at.rows), at.columns, -1)
        codes = signs(former).view(*former.shape[:-2], *view)
        wanted = (codes * spread).to(former.dtype).view(former.shape)
        for kept in (packed, signs(former).to(torch.float8_e4m3fn)):
            for functions in (kernel, ternarise_reference):
                out = torch.full_like(former, 7.0)
                functions.unpack(kept, scales, out, at.halves)
                assert same_bits(out, wanted)


def test_every_whole_number_that_float8_holds_becomes_a_value(kernel: ternarise_cpu.CompiledTernary) -> None:
    codes = torch.arange(-16, 17, dtype=torch.int8)[None]
    out, scale = torch.empty(1, 33), torch.tensor([[0.3]])
    kernel.unpack(codes.to(torch.float8_e4m3fn), scale, out, 1)
    assert torch.equal(out, codes * scale)


@settings(max_examples=60, deadline=None)
@given(case=ternary_lists())
def test_sums_of_blocks_can_be_made_of_those_of_rows(case: TernaryList) -> None:
    wanted = block_abs_sums(case.weights, case.blocks)
    for weight, at, sums in zip(case.weights, case.blocks, wanted, strict=True):
        n = weight.shape[:-1].numel()
        (rows,) = block_abs_sums([weight.reshape(n, -1)], [Blocks(n, at.columns)])
        assert same_bits(joined_rows(rows.view(*weight.shape[:-1], at.columns), at), sums)


@pytest.mark.parametrize("dtype", DTYPES)
def test_around_ties_of_every_binade(kernel: ternarise_cpu.CompiledTernary, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(-149.0, 127.0)[:, None]
    scales = torch.ldexp(1 + torch.rand(276, 8, generator=generator), exponents).float().clamp(min=2.0**-149)
    half = (scales / 2).to(dtype)
    ticks = half.view(torch.int32 if dtype is torch.float32 else torch.int16)
    near = torch.stack([(ticks + tick).clamp(min=0).view(dtype) for tick in range(-3, 4)], -1)
    near = torch.cat((near, -near), -1).reshape(-1, 1, 14)
    found, wanted = (torch.zeros_like(near) for _ in range(2))
    by_row = scales.reshape(-1, 1, 1)
    kernel.ternarise([near], [by_row], [found], [1], None)
    ternarise_reference.ternarise([near], [by_row], [wanted], [1], None)
    assert torch.equal(signs(found), signs(wanted))
    assert same_bits(found, wanted)


def test_sums_are_those_of_each_block() -> None:
    weight = torch.randn(3, 12, 300, generator=torch.Generator().manual_seed(1))
    (sums,) = block_abs_sums([weight], [Blocks(3, 2, 2)])
    for batch in range(3):
        for row in range(3):
            for column in range(2):
                halves = (weight[batch, half + 2 * row : half + 2 * row + 2] for half in (0, 6))
                values = [v for part in halves for v in part[:, 150 * column : 150 * column + 150].flatten().tolist()]
                assert sums[batch, row, column].item() == pytest.approx(math.fsum(map(abs, values)), rel=1e-15)
    weight[1, 0, 0] = math.nan
    assert block_abs_sums([weight], [Blocks(3, 2, 2)])[0].isnan().sum() == 1


def test_the_number_of_threads_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(shape, generator=generator) for shape in ((700, 301), (2, 64, 1024))]
    blocks, threads, found = [Blocks(1, 7), Blocks(2, 1, 2)], torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            sums = block_abs_sums(weights, blocks)
            outs = [torch.zeros(weight.shape, dtype=torch.bfloat16) for weight in weights]
            scales = [total.float() / total.amax().float() for total in sums]
            found.append([*sums, *outs, ternarise(weights, scales, outs, [at.halves for at in blocks])])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_values_that_are_ternary_stay_as_they_are() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    scale, out = weight.abs().mean().view(1, 1), torch.zeros(64, 96)
    counts = ternarise([weight], [scale], [out])
    assert counts.tolist() == [[int((out == 0).sum()), int((out != 0).sum())]]
    again = out.clone()
    assert ternarise([out.clone()], [scale], [again]).tolist() == [[counts[0, 0].item(), 0]]
    assert torch.equal(again, out)
    assert set(out.unique().tolist()) == {0.0, scale.item(), -scale.item()}


def test_no_scale_that_is_not_finite_goes_unseen() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.1]])
    for scale in (math.nan, math.inf):
        out = torch.zeros(1, 3)
        assert ternarise([weight], [torch.tensor([[scale]])], [out]).tolist() == [[3, 0]]
        assert out.isnan().all()


@pytest.mark.parametrize("width", range(1, 10))
def test_packed_codes_are_those_of_the_file_format(width: int) -> None:
    codes = torch.randint(-1, 2, (5, width), generator=torch.Generator().manual_seed(width), dtype=torch.int8)
    packed, out = torch.empty(5, -(-width // 4), dtype=torch.uint8), torch.zeros(5, width)
    ternarise([codes.float()], [torch.ones(1, 1)], [out], packed=[packed])
    assert torch.equal(packed, pack_trits4(codes))


def test_an_empty_list() -> None:
    assert block_abs_sums([], []) == []
    assert ternarise([], [], []).shape == (0, 2)


def _square(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(4, 4, dtype=dtype)


@pytest.mark.parametrize(
    ("weight", "scale", "out", "halves", "packed", "message"),
    [
        (_square(), torch.ones(3, 1), _square(), 1, None, "3 x 1 blocks do not divide weight 0"),
        (_square(), torch.ones(4, 1), _square(), 2, None, "R must divide o / 2"),
        (_square(), torch.ones(1, 1), _square(), 3, None, "of 1 or 2 halves"),
        (_square(), torch.ones(1, 1).double(), _square(), 1, None, "scales 0 must be"),
        (_square(), torch.ones(2, 1, 1), _square(), 1, None, "scales 0 must be"),
        (_square(torch.bfloat16), torch.ones(1, 1), _square(), 1, None, "out 0 must be contiguous"),
        (_square(), torch.ones(1, 1), _square().T[:2], 1, None, "out 0 must be contiguous"),
        (_square(torch.int8), torch.ones(1, 1), _square(), 1, None, "weights must be of one floating-point dtype"),
        (
            _square(),
            torch.ones(1, 1),
            _square(),
            1,
            torch.zeros(4, 2, dtype=torch.uint8),
            r"packed 0 .* \[4, 1\] uint8",
        ),
    ],
)
def test_what_does_not_fit_is_said(weight, scale, out, halves, packed, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ternarise([weight], [scale], [out], [halves], None if packed is None else [packed])


def test_nothing_to_write_to_is_said() -> None:
    with pytest.raises(ValueError, match="neither outs nor packed"):
        ternarise([_square()], [torch.ones(1, 1)], None)


@pytest.mark.parametrize(
    ("kept", "scales", "out", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.uint8), torch.ones(1, 1), _square(), r"packed 0 .* \[4, 1\] uint8"),
        (torch.zeros(4, 4, dtype=torch.int8), torch.ones(1, 1), _square(), "float8_e4m3fn, or four a byte in uint8"),
        (torch.zeros(4, 1, dtype=torch.uint8), torch.ones(3, 1), _square(), "3 x 1 blocks do not divide"),
        (torch.zeros(4, 1, dtype=torch.uint8), torch.ones(1, 1).double(), _square(), "and scales"),
    ],
)
def test_codes_that_do_not_fit_are_said(kept: Tensor, scales: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(kept, scales, out)


def test_blocks_that_do_not_fit_are_said() -> None:
    with pytest.raises(ValueError, match="1 x 3 blocks do not divide weight 0"):
        block_abs_sums([_square()], [Blocks(1, 3)])
    with pytest.raises(ValueError, match="weights must be of one"):
        block_abs_sums([_square(), _square(torch.float16)], [Blocks(1, 1)] * 2)
