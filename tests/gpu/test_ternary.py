"""The CUDA kernels of ternary matrices on a GPU, against the definitions; `kernels/gpu_check.sh` runs this."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megacpt.ops import packed_linear_reference, ternarise_reference
from megacpt.ops.native_cuda import LIBRARY
from megacpt.ops.packed_matrix import PackedMatrix, pack_matrix
from megacpt.ops.ternarise_reference import Blocks
from megacpt.serve.decoder import Decoder
from megacpt.serve.linear import Activations, PackedLinear
from tests.serve.llama import MadeUp, model_config, reference

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA kernels are not built"),
]
FORMATS = [(torch.float32, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
FORMATS += [(dtype, dtype) for dtype in (torch.bfloat16, torch.float16)]
SHAPES = [
    ((1000, 512), Blocks(1, 1)),
    ((64, 130), Blocks(2, 1, 2)),
    ((3, 96, 1024), Blocks(96, 8)),
    ((5, 7), Blocks(1, 1)),
]


@pytest.mark.parametrize(("dtype", "out_dtype"), FORMATS)
def test_quantisation_is_that_of_the_definition(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    from megacpt.ops import ternarise_cuda

    kernels, generator = ternarise_cuda.load(), torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape, _ in SHAPES * 12]
    blocks, there = [at for _, at in SHAPES * 12], [weight.cuda() for weight in weights]
    wanted = ternarise_reference.block_abs_sums(weights, blocks)
    sums = kernels.block_abs_sums(there, blocks)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(sums, wanted, strict=True))
    scales = [
        (a / weight.numel() * at.rows * at.columns).float()
        for a, weight, at in zip(wanted, weights, blocks, strict=True)
    ]
    halves, found = [at.halves for at in blocks], []
    for functions, device in ((kernels, "cuda"), (ternarise_reference, "cpu")):
        outs = [torch.ones(weight.shape, dtype=out_dtype, device=device) for weight in weights]
        packed = [
            torch.empty(*weight.shape[:-1], -(-weight.shape[-1] // 4), dtype=torch.uint8, device=device)
            for weight in weights
        ]
        placed = [scale.to(device) for scale in scales]
        counts = functions.ternarise(there if device == "cuda" else weights, placed, outs, halves, packed)
        found.append([tensor.cpu() for tensor in (counts, *outs, *packed)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def draw(tokens: int, o: int, i: int, rows: int, columns: int) -> tuple[Tensor, PackedMatrix]:
    """Activations, and a matrix with rows x columns scales."""
    generator = torch.Generator("cuda").manual_seed(tokens + o + i)
    codes = torch.randint(-1, 2, (o, i), generator=generator, device="cuda", dtype=torch.int8)
    scales = torch.rand(rows, columns, generator=generator, device="cuda") + 0.1
    return torch.randn(tokens, i, generator=generator, device="cuda").bfloat16(), pack_matrix(codes, scales)


@pytest.mark.parametrize("tokens", [1, 7, 16, 17, 33, 64, 65, 256, 300])
@pytest.mark.parametrize(
    ("o", "i", "rows", "columns"), [(4096, 4096, 1, 1), (11008, 1032, 2, 1), (500, 1024, 500, 8), (16, 96, 1, 2)]
)
def test_products_agree_with_the_definition(tokens: int, o: int, i: int, rows: int, columns: int) -> None:
    from megacpt.ops import packed_linear_cuda

    linear = packed_linear_cuda.load()
    x, matrix = draw(tokens, o, i, rows, columns)
    found = linear.packed_linear(x, matrix, "float")
    wanted = packed_linear_reference.packed_linear(x.double(), matrix, "float")
    rounded = columns > 1 and tokens > packed_linear_cuda.MOST_TOKENS  # values are, to bfloat16
    size = wanted.abs().mean()
    torch.testing.assert_close(found.double(), wanted, atol=float(size) * (0.03 if rounded else 1e-3), rtol=2.0**-8)
    assert all(torch.equal(found, linear.packed_linear(x, matrix, "float")) for _ in range(3))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs products of float8"
)
@pytest.mark.parametrize("tokens", [48, 300])
def test_float8_rounds_activations_alone(tokens: int) -> None:
    from megacpt.ops import packed_linear_cuda

    x, matrix = draw(tokens, 512, 1024, 512, 1)
    found = packed_linear_cuda.load().packed_linear(x, matrix, "fp8").double()
    wanted = packed_linear_reference.packed_linear(x.double(), matrix, "fp8")
    torch.testing.assert_close(found, wanted, atol=float(wanted.abs().mean()) * 2e-2, rtol=2.0**-7)


@pytest.mark.parametrize("activations", ["float", "fp8"])
def test_a_decoder_on_the_gpu_gives_the_logits_of_a_plain_llama(activations: Activations) -> None:
    source = MadeUp(model_config(hidden=128, ffn=256, qk_norm=True), stored=torch.bfloat16)
    decoder = Decoder(source, activations, torch.device("cuda"), torch.bfloat16)
    layer = decoder.layers[0].down
    assert isinstance(layer, PackedLinear)
    assert layer.matrix.tiled
    tokens = list(range(40))
    wanted, cache = reference(source, tokens), decoder.cache()
    found = [decoder.feed(tokens[:20], cache), *(decoder.feed([token], cache) for token in tokens[20:])]
    error = (torch.stack(found).cpu().double() - wanted[19:]).abs().max() / wanted.abs().max()
    assert error < (0.05 if activations == "float" else 0.15)
