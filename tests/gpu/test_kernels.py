"""The CUDA kernels on a GPU, against the definitions on the same device; `kernels/gpu_check.sh` runs this."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megacpt.ops import expert_order_reference, router_reference
from megacpt.ops.native_cuda import LIBRARY
from megacpt.ops.router_reference import PROBABILITY_ONE, Scoring

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA kernels are not built"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SHAPES = ((0, 8, 2), (1, 1, 1), (257, 8, 1), (1000, 31, 3), (1000, 64, 6), (513, 128, 8), (300, 256, 8), (70, 520, 32))
SCORINGS = (("softmax", True, 1), ("softmax", False, 1), ("sigmoid", True, 1), ("sigmoid", True, 4))


def draw(rows: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits with ties and rows that are broken, and a mask."""
    generator = torch.Generator().manual_seed(rows + experts)
    logits = (torch.randn(rows, experts, generator=generator) * 3).mul(4).round().div(4)
    if rows > 4:
        logits[1, 0], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    return logits.to(dtype).cuda(), (torch.rand(rows, generator=generator) > 0.2).cuda()


@pytest.fixture(scope="module")
def kernels():
    from megacpt.ops import router_cuda

    return router_cuda.load()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("score", "renormalise", "groups"), SCORINGS)
def test_router_agrees_with_the_definition(kernels, dtype, shape, score, renormalise: bool, groups: int) -> None:
    rows, experts, top_k = shape
    if experts % groups or (groups > 1 and (top_k % 2 or top_k > experts // 2)):
        groups = 1
    scoring = Scoring(top_k, score, renormalise, 1.5, groups=groups, groups_kept=2 if groups > 1 else 1)
    logits, mask = draw(rows, experts, dtype)
    found = kernels.route(logits, None, mask, scoring)
    wanted = router_reference.route(logits.double(), None, mask, scoring)
    same = (found.experts == wanted.experts).all(1)
    assert same.all() or groups > 1
    torch.testing.assert_close(found.gates[same].double(), wanted.gates[same], atol=2e-6, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(found.lse.double(), wanted.lse, atol=1e-5, rtol=1e-6, equal_nan=True)
    assert ((found.prob_sum - wanted.prob_sum).abs().double() / PROBABILITY_ONE <= 1e-6 * rows).all()
    again = kernels.route(logits, None, mask, scoring)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, again, strict=True))

    up = torch.randn(rows, top_k, device="cuda")
    c, z = torch.randn(experts, device="cuda"), torch.randn(1, device="cuda")
    grad = kernels.gradient(logits, found.lse, found.experts, up, c, z, scoring).double()
    exact = router_reference.gradient(
        logits.double(), wanted.lse, found.experts, up.double(), c.double(), z.double(), scoring
    )
    size = 1 + 1.5 * up.abs().sum(1, keepdim=True) + 2 * wanted.lse.abs().nan_to_num()[:, None]
    assert torch.equal(grad.isnan(), exact.isnan())
    assert (((grad - exact).abs() / size).nan_to_num() <= 4 * EPS[dtype]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [8, 31, 256])
def test_sinkhorn_agrees_with_single_steps(kernels, dtype: torch.dtype, experts: int) -> None:
    logits, mask = draw(5000, experts, dtype)
    start = torch.zeros(experts, dtype=torch.float64, device="cuda")
    log_u, made, error = kernels.sinkhorn(logits, start, mask, 1e-2, 8)
    assert made <= 8
    assert log_u.isfinite().all()
    sums = kernels.softmax_sums(logits, log_u.float(), mask).double()
    wanted = router_reference.softmax_sums(logits, log_u.float(), mask).double()
    assert ((sums - wanted).abs() / PROBABILITY_ONE <= 1e-6 * len(logits)).all()
    imbalance = float((experts * sums / sums.sum() - 1).abs().mean())
    assert imbalance <= max(1.1 * error, 1e-2)
    assert torch.equal(log_u, kernels.sinkhorn(logits, start, mask, 1e-2, 8)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "hidden"), [(0, 4, 8), (1, 1, 1), (5000, 31, 33), (9000, 256, 128)])
def test_expert_order_agrees_with_the_definition(dtype: torch.dtype, rows: int, width: int, hidden: int) -> None:
    from megacpt.ops import expert_order_cuda

    order = expert_order_cuda.load()
    experts = torch.randint(-1, width, (rows, 4), dtype=torch.int32, device="cuda")
    perm, inverse, counts = found = order.sort(experts, width)
    assert all(torch.equal(a, b) for a, b in zip(found, expert_order_reference.sort(experts, width), strict=True))
    x, y = torch.randn(rows, hidden, device="cuda").to(dtype), torch.randn(4 * rows, hidden, device="cuda").to(dtype)
    assert torch.equal(order.gather(x, *found), expert_order_reference.gather(x, *found))
    gates = torch.randn(rows, 4, device="cuda")
    exact = expert_order_reference.combine(y.double(), inverse, gates.double())
    torch.testing.assert_close(order.combine(y, inverse, gates).double(), exact, atol=1e-5, rtol=EPS[dtype])
    by_rows, by_gates = order.combine_gradient(x, y, perm, inverse, counts, gates)
    exact_rows, exact_gates = expert_order_reference.combine_gradient(
        x.double(), y.double(), perm, inverse, counts, gates.double()
    )
    torch.testing.assert_close(by_rows.double(), exact_rows, atol=1e-6, rtol=EPS[dtype])
    torch.testing.assert_close(by_gates.double(), exact_gates, atol=1e-3, rtol=1e-5)
