"""The CUDA kernels against the definitions, without a GPU: compiled for the CPU, each thread a coroutine.

Every line, shuffle and barrier of the kernels runs as it is written (`kernels/cuda/emulated.h`). What this can't show
are races between threads that run at once, for which `kernels/gpu_check.sh` has compute-sanitizer, and speed.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megacpt.ops import expert_order_reference, router_reference
from megacpt.ops.expert_order_cuda import CudaOrder
from megacpt.ops.router_cuda import CudaRouter
from megacpt.ops.router_reference import PROBABILITY_ONE, Z_ONE, Scoring
from megacpt.ops.sinkhorn import Balanced, sinkhorn
from tests.ops.scorings import scorings

EXPERTS = (1, 2, 8, 31, 64, 96, 128, 256, 512, 520)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.fixture(scope="session")
def kernel(emulated: ctypes.CDLL) -> CudaRouter:
    return CudaRouter(emulated, stream=lambda _: 0)


@pytest.fixture(scope="session")
def order(emulated: ctypes.CDLL) -> CudaOrder:
    return CudaOrder(emulated, stream=lambda _: 0)


@st.composite
def tokens(draw: st.DrawFn) -> tuple[Tensor, Scoring, Tensor | None]:
    """Logits with ties, infinities, NaN, subnormals and equal rows; a scoring; a mask or none."""
    experts = draw(st.sampled_from(EXPERTS))
    rows = draw(st.sampled_from((0, 1, 5, 30, 200 if experts < 64 else 20)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(rows, experts, generator=generator) * draw(st.sampled_from((0.0, 1e-40, 1.0, 30.0)))
    if draw(st.booleans()):
        logits = logits.round()
    for value in (torch.nan, torch.inf, -torch.inf):
        if rows and draw(st.booleans()):
            logits[draw(st.integers(0, rows - 1)), draw(st.integers(0, experts - 1))] = value
    if rows and draw(st.booleans()):
        logits[draw(st.integers(0, rows - 1))] = -torch.inf
    mask = torch.rand(rows, generator=generator) > 0.3 if draw(st.booleans()) else None
    return logits.to(draw(st.sampled_from(DTYPES))), draw(scorings(experts, most=32)), mask


@settings(max_examples=60, deadline=None)
@given(case=tokens(), biased=st.booleans())
def test_forward_agrees_with_the_definition(kernel: CudaRouter, case, biased: bool) -> None:
    logits, scoring, mask = case
    bias = torch.linspace(-1, 1, logits.shape[1]).flip(0) if biased and scoring.groups == 1 else None
    if bias is not None:
        scoring = Scoring(scoring.top_k, scoring.score, scoring.renormalise, scoring.scale, bias_on_logits=True)
    found = kernel.route(logits, bias, mask, scoring)
    # Which experts, in the arithmetic of the kernel: a bias is added in float32.
    same = (found.experts == router_reference.route(logits, bias, mask, scoring).experts).all(1)
    wanted = router_reference.route(logits.double(), bias, mask, scoring)
    if scoring.groups == 1:
        assert same.all()
    same &= (found.experts == wanted.experts).all(1)
    if same.all():
        assert torch.equal(found.counts, wanted.counts)
    torch.testing.assert_close(found.gates[same].double(), wanted.gates[same], atol=2e-6, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(found.lse.double(), wanted.lse, atol=1e-5, rtol=1e-6, equal_nan=True)
    error = (found.prob_sum - wanted.prob_sum).abs().double() / PROBABILITY_ONE
    assert (error <= 1e-6 * len(logits)).all()
    assert abs(int(found.z_sum) - int(wanted.z_sum)) / Z_ONE <= 1e-4 * len(logits) + 1e-5 * int(wanted.z_sum) / Z_ONE


@settings(max_examples=60, deadline=None)
@given(case=tokens(), seed=st.integers(0, 2**32))
def test_gradient_agrees_with_the_definition(kernel: CudaRouter, case, seed: int) -> None:
    logits, scoring, mask = case
    generator = torch.Generator().manual_seed(seed)
    at = router_reference.route(logits, None, mask, scoring)
    up = torch.randn(len(logits), scoring.top_k, generator=generator)
    coefficients = torch.randn(logits.shape[1], generator=generator), torch.randn(1, generator=generator)
    found = kernel.gradient(logits, at.lse, at.experts, up, *coefficients, scoring).double()
    exact = router_reference.route(logits.double(), None, mask, scoring).lse
    wanted = router_reference.gradient(
        logits.double(), exact, at.experts, up.double(), *(c.double() for c in coefficients), scoring
    )
    size = 1 + up.abs().sum(1, keepdim=True) * scoring.scale + 2 * exact.abs().nan_to_num()[:, None]
    assert (found.isnan() == wanted.isnan()).all()
    assert (((found - wanted).abs() / size).nan_to_num() <= 4 * EPS[logits.dtype]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [31, 64])
def test_sums_do_not_depend_on_the_order_of_tokens_or_ranks(kernel: CudaRouter, dtype, experts: int) -> None:
    logits = torch.randn(600, experts, generator=torch.Generator().manual_seed(1)).to(dtype)
    one = kernel.route(logits, None, None, Scoring(3))
    parts = [kernel.route(part, None, None, Scoring(3)) for part in logits.flip(0).chunk(4)]
    for name in ("counts", "prob_sum", "z_sum"):
        assert torch.equal(sum(getattr(part, name) for part in parts), getattr(one, name))


def test_rows_that_do_not_begin_at_16_bytes(kernel: CudaRouter) -> None:
    buffer = torch.randn(1 + 40 * 64, generator=torch.Generator().manual_seed(2))
    logits, scoring = buffer[1:].view(40, 64), Scoring(4)
    found, wanted = kernel.route(logits, None, None, scoring), router_reference.route(logits, None, None, scoring)
    assert torch.equal(found.experts, wanted.experts)
    up = torch.ones(40, 4)
    coefficients = torch.ones(64), torch.ones(1)
    grad = kernel.gradient(logits, found.lse, found.experts, up, *coefficients, scoring)
    exact = router_reference.gradient(logits, found.lse, found.experts, up, *coefficients, scoring)
    torch.testing.assert_close(grad, exact, atol=1e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(case=tokens())
def test_softmax_sums_agree_with_the_definition(kernel: CudaRouter, case) -> None:
    logits, _, mask = case
    log_u = torch.linspace(-2, 2, logits.shape[1])
    found, wanted = (f.softmax_sums(logits, log_u, mask) for f in (kernel, router_reference))
    assert ((found - wanted).abs().double() / PROBABILITY_ONE <= 1e-6 * len(logits)).all()


@settings(max_examples=15, deadline=None)
@given(case=tokens(), most=st.integers(0, 4), warm=st.booleans())
def test_the_sinkhorn_loop_is_that_of_single_steps(kernel: CudaRouter, case, most: int, warm: bool) -> None:
    logits, _, mask = case
    start = torch.linspace(-1, 1, logits.shape[1]).double() * warm
    log_u, iterations, error = kernel.sinkhorn(logits, start, mask, 1e-2, most)
    wanted = reference_loop(logits, start, mask, most)
    assert iterations == wanted.iterations
    assert error == pytest.approx(wanted.error, abs=1e-5, rel=1e-5)
    torch.testing.assert_close(log_u.float(), wanted.log_u.float(), atol=1e-3, rtol=1e-4)


def reference_loop(logits: Tensor, start: Tensor, mask: Tensor | None, most: int) -> Balanced:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGACPT_KERNELS", "reference")
        return sinkhorn(logits, log_u=start.float(), mask=mask, most_iterations=most)


@settings(max_examples=25, deadline=None)
@given(
    count=st.sampled_from((0, 1, 7, 300)),
    top_k=st.integers(1, 4),
    width=st.sampled_from((1, 5, 31, 200)),
    seed=st.integers(0, 2**32),
)
def test_the_sort_is_that_of_the_definition(order: CudaOrder, count: int, top_k: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(-1, width + 1, (count, top_k), generator=generator, dtype=torch.int32)
    for found, wanted in zip(order.sort(experts, width), expert_order_reference.sort(experts, width), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 24, 520])
def test_rows_and_their_gradients_agree_with_the_definition(order: CudaOrder, dtype: torch.dtype, hidden: int) -> None:
    generator = torch.Generator().manual_seed(hidden)
    experts = torch.randint(-1, 4, (20, 3), generator=generator, dtype=torch.int32)
    perm, inverse, counts = order.sort(experts, 4)
    held = int(counts.sum())
    x, gates = torch.randn(20, hidden, generator=generator).to(dtype), torch.randn(20, 3, generator=generator)
    assert torch.equal(order.gather(x, perm, inverse, counts), expert_order_reference.gather(x, perm, inverse, counts))
    rows, up = (torch.randn(n, hidden, generator=generator).to(dtype) for n in (60, 20))
    rows[held:] = torch.nan  # nothing reads them
    exact = rows.double(), inverse, gates.double()
    eps = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for weights in (gates, None):
        wanted = expert_order_reference.combine(exact[0], inverse, None if weights is None else exact[2])
        torch.testing.assert_close(order.combine(rows, inverse, weights).double(), wanted, atol=1e-5, rtol=eps)
    found = order.combine_gradient(up, rows, perm, inverse, counts, gates)
    wanted = expert_order_reference.combine_gradient(up.double(), exact[0], perm, inverse, counts, exact[2])
    torch.testing.assert_close(found[0].double(), wanted[0], atol=1e-6, rtol=eps)
    torch.testing.assert_close(found[1].double(), wanted[1], atol=2e-4, rtol=1e-5)
