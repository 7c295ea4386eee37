"""The CUDA kernels of ternary matrices against their definitions, without a GPU; see `test_cuda_emulated`."""

from __future__ import annotations

import ctypes
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from megacpt.ops import packed_linear_reference, ternarise_reference
from megacpt.ops.packed_linear import Activations, packed_linear
from megacpt.ops.packed_linear_cuda import MOST_TOKENS, CudaLinear
from megacpt.ops.packed_matrix import PackedMatrix, pack_matrix
from megacpt.ops.ternarise_cuda import CudaTernary
from megacpt.ops.ternarise_reference import Blocks
from megacpt.quant.activations import round_tokens
from megacpt.serve.decoder import Decoder
from tests.ops.ternary import TernaryList, same_bits, ternary_lists
from tests.serve.llama import MadeUp, model_config, reference


@pytest.fixture(scope="session")
def ternary(emulated: ctypes.CDLL) -> CudaTernary:
    return CudaTernary(emulated, stream=lambda _: 0)


@settings(max_examples=30, deadline=None)
@given(case=ternary_lists(most=3))
def test_quantisation_is_that_of_the_definition(ternary: CudaTernary, case: TernaryList) -> None:
    sums = ternary.block_abs_sums(case.weights, case.blocks)
    for found, wanted in zip(sums, ternarise_reference.block_abs_sums(case.weights, case.blocks), strict=True):
        assert same_bits(found, wanted)
    (mine, *found), (theirs, *wanted) = (case.ternarised(functions) for functions in (ternary, ternarise_reference))
    assert torch.equal(mine, theirs)
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(map(torch.equal, case.packed_alone(ternary), case.packed_alone(ternarise_reference)))


def test_lists_longer_than_a_launch_takes(ternary: CudaTernary) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(2, 8 + n, generator=generator) for n in range(50)]
    blocks = [Blocks(1, 1)] * 50
    sums = ternary.block_abs_sums(weights, blocks)
    assert all(map(torch.equal, sums, ternarise_reference.block_abs_sums(weights, blocks)))
    scales = [total.float() / 20 for total in sums]
    counts = []
    for functions in (ternary, ternarise_reference):
        outs = [torch.zeros_like(weight) for weight in weights]
        counts.append(functions.ternarise(weights, scales, outs, [1] * 50, None))
    assert torch.equal(*counts)


@pytest.fixture(scope="session")
def linear(emulated: ctypes.CDLL) -> CudaLinear:
    return CudaLinear(emulated, stream=lambda _: 0)


def draw(tokens: int, o: int, i: int, rows: int, columns: int) -> tuple[Tensor, PackedMatrix]:
    """Activations, and a matrix with rows x columns scales."""
    generator = torch.Generator().manual_seed(tokens + o + i)
    codes = torch.randint(-1, 2, (o, i), generator=generator, dtype=torch.int8)
    scales = torch.rand(rows, columns, generator=generator) + 0.1
    return torch.randn(tokens, i, generator=generator).bfloat16(), pack_matrix(codes, scales, tiled=True)


def test_a_tile_holds_every_code_once_where_tensor_cores_want_it() -> None:
    codes = torch.randint(-1, 2, (20, 200), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    matrix = pack_matrix(codes, torch.ones(1, 1), tiled=True)
    assert torch.equal(matrix.codes(), codes)
    words = matrix.data
    assert words.shape == (2, 2, 32, 4)
    for row, column in ((0, 0), (3, 77), (8, 63), (15, 127), (17, 199), (19, 128)):
        r, c = row % 16, column % 128
        word = int(words[row // 16, column // 128, r % 8 * 4 + c % 64 // 16, c // 64 * 2 + r // 8])
        field = word >> (16 * (c % 2) + 14 - c % 16 // 2 * 2) & 3
        assert {0: 0, 1: 1, 3: -1}[field] == codes[row, column]


@pytest.mark.parametrize(
    ("tokens", "o", "i", "rows", "columns"),
    [
        (1, 16, 128, 1, 1),
        (1, 300, 1032, 1, 1),
        (3, 257, 640, 257, 5),
        (8, 24, 8, 3, 1),
        (13, 40, 264, 1, 1),
        (16, 272, 512, 2, 2),
        (32, 33, 768, 1, 3),
        (33, 20, 384, 1, 1),
        (64, 140, 256, 1, 2),
        (70, 16, 136, 1, 1),
    ],
)
def test_products_with_few_tokens_agree_with_the_definition(
    linear: CudaLinear, tokens: int, o: int, i: int, rows: int, columns: int
) -> None:
    x, matrix = draw(tokens, o, i, rows, columns)
    found = linear.packed_linear(x, matrix, "float")
    wanted = packed_linear_reference.packed_linear(x.double(), matrix, "float")
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=2.0**-8)
    assert torch.equal(found, linear.packed_linear(x, matrix, "float"))
    assert not linear._workspace(x.device, 0).any()  # as the next launch must find it


def test_columns_are_cut_where_rows_are_few(linear: CudaLinear, emulated: ctypes.CDLL) -> None:
    assert emulated.megacpt_cuda_packed_splits(1, 16, 1024, 1) == 3  # of three blocks that run at once
    assert emulated.megacpt_cuda_packed_splits(1, 16, 300, 1) == 1
    x, matrix = draw(9, 16, 1024, 1, 1)
    x[2, 5] = torch.inf
    found, wanted = linear.packed_linear(x, matrix, "float"), packed_linear_reference.packed_linear(x, matrix, "float")
    assert torch.equal(found.isfinite(), wanted.isfinite())


@pytest.mark.parametrize(("o", "i", "rows", "columns"), [(16, 128, 1, 1), (37, 272, 37, 1), (20, 96, 4, 3)])
def test_many_tokens_see_the_unpacked_matrix(linear: CudaLinear, o: int, i: int, rows: int, columns: int) -> None:
    x, matrix = draw(MOST_TOKENS + 1, o, i, rows, columns)
    codes = matrix.codes()
    assert torch.equal(linear.unpacked(matrix, 0), codes.bfloat16())
    assert torch.equal(linear.unpacked(matrix, 1).view(torch.float8_e4m3fn).float(), codes.float())
    values = codes * matrix.scales.repeat_interleave(i // columns, 1)
    assert torch.equal(linear.unpacked(matrix, 2), values.bfloat16())
    found = linear.packed_linear(x, matrix, "float")
    wanted = packed_linear_reference.packed_linear(x, matrix, "float")
    torch.testing.assert_close(found, wanted, atol=0.2 if columns > 1 else 1e-3, rtol=2.0**-7)


@pytest.mark.parametrize(
    ("tokens", "o", "columns"),
    [(17, 32, 1), (MOST_TOKENS + 1, 32, 1), (MOST_TOKENS + 1, 32, 5), (MOST_TOKENS + 1, 33, 1)],
)
def test_float8_rounds_activations_as_training_does(linear: CudaLinear, tokens: int, o: int, columns: int) -> None:
    x, matrix = draw(tokens, o, 160, o, columns)
    rounded = round_tokens(x.float(), "fp8")
    wanted = packed_linear_reference.packed_linear(rounded, matrix, "float")
    found = linear.packed_linear(x, matrix, "fp8")
    torch.testing.assert_close(found.float(), wanted, atol=0.2 if columns > 1 else 2e-2, rtol=2.0**-7)
    assert not torch.equal(found, linear.packed_linear(x, matrix, "float"))


@pytest.mark.parametrize(("i", "columns", "activations"), [(100, 1, "float"), (300, 3, "float"), (128, 1, "int8")])
def test_what_no_kernel_fits_is_left_to_the_definition(linear: CudaLinear, i: int, columns: int, activations) -> None:
    x, matrix = draw(3, 16, i, 1, columns)
    assert torch.equal(
        linear.packed_linear(x, matrix, activations), packed_linear_reference.packed_linear(x, matrix, activations)
    )


def test_rows_that_do_not_begin_at_16_bytes(linear: CudaLinear) -> None:
    x, matrix = draw(5, 16, 128, 1, 1)
    askew = torch.zeros(5 * 128 + 1, dtype=torch.bfloat16)[1:].view(5, 128).copy_(x)
    assert torch.equal(linear.packed_linear(askew, matrix, "float"), linear.packed_linear(x, matrix, "float"))


@pytest.mark.parametrize("activations", ["float", "fp8"])
def test_a_decoder_in_bfloat16_decodes_with_them(
    linear: CudaLinear, activations: Activations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megacpt.serve.linear.packed_linear", linear.packed_linear)
    monkeypatch.setattr("megacpt.serve.linear.pack_matrix", partial(pack_matrix, tiled=True))
    source, tokens = MadeUp(model_config(layers=1), stored=torch.bfloat16), [5, 0, 70, 3]
    decoder = Decoder(source, activations, dtype=torch.bfloat16)
    cache = decoder.cache()
    found = torch.stack([decoder.feed(tokens[:3], cache), decoder.feed(tokens[3:], cache)])
    expected = reference(source, tokens)[2:]
    share = 0.03 if activations == "float" else 0.15
    torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=share * float(expected.abs().max()))


def test_a_matrix_in_the_layout_of_another_device_is_refused(linear: CudaLinear) -> None:
    x, matrix = draw(1, 16, 128, 1, 1)
    with pytest.raises(ValueError, match="in the tiles of CUDA's kernels"):
        packed_linear(x, matrix)
    with pytest.raises(ValueError, match="not in tiles"):
        linear.packed_linear(x, pack_matrix(matrix.codes(), matrix.scales), "float")
