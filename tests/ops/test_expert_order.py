"""Tokens to their experts and back: the definition against plain loops and autograd, the kernels against it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megacpt.ops import expert_order_cpu, expert_order_reference
from megacpt.ops.expert_order import combine_tokens, gather_tokens, moe_sort
from megacpt.ops.native import INSTRUCTION_SETS, instruction_set, library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of sums near 1, accumulated in float32 and rounded once.
EPS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.fixture(scope="module", params=range(instruction_set() + 1), ids=INSTRUCTION_SETS[: instruction_set() + 1])
def kernel(request: pytest.FixtureRequest) -> expert_order_cpu.CompiledOrder:
    """The compiled functions, on each instruction set that this processor has."""
    return expert_order_cpu.CompiledOrder(library(), request.param)


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Experts of tokens, some of them none; the same expert may come twice."""
    width = draw(st.sampled_from((1, 2, 8, 31, 64, 96, 256, 512)))
    chosen = draw(st.sampled_from((1, 2, 6, 31, width)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    experts = torch.randint(0, width, (draw(st.integers(0, 40)), chosen), generator=generator, dtype=torch.int32)
    dropped = torch.rand(experts.shape, generator=generator) < draw(st.sampled_from((0.0, 0.3, 1.0)))
    return experts.masked_fill(dropped, -1), width


@settings(max_examples=150, deadline=None)
@given(case=choices())
def test_the_sort_is_that_of_a_loop(kernel: expert_order_cpu.CompiledOrder, case: tuple[Tensor, int]) -> None:
    experts, width = case
    flat = experts.flatten().tolist()
    wanted = sorted(range(len(flat)), key=lambda slot: flat[slot] if flat[slot] >= 0 else width)
    for functions in (kernel, expert_order_reference):
        perm, inverse, counts = functions.sort(experts, width)
        assert perm.tolist() == wanted
        assert counts.tolist() == [flat.count(e) for e in range(width)]
        assert inverse.flatten().tolist() == [wanted.index(s) if flat[s] >= 0 else -1 for s in range(len(flat))]
        assert perm.dtype is inverse.dtype is torch.int32


def test_a_long_sort_is_stable_on_any_number_of_threads() -> None:
    experts = torch.randint(-1, 64, (20_000, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    wanted = expert_order_reference.sort(experts, 64)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found = expert_order_cpu.load().sort(experts, 64)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_an_expert_that_does_not_exist_is_none() -> None:
    order = moe_sort(torch.tensor([[7, 1], [-3, 0]], dtype=torch.int32), 2)
    assert order.counts.tolist() == [1, 1]
    assert order.ends.tolist() == [1, 2]
    assert order.inverse.tolist() == [[-1, 1], [-1, 0]]


@settings(max_examples=150, deadline=None)
@given(
    case=choices(),
    hidden=st.sampled_from((1, 7, 16, 64, 100)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_kernels_agree_with_the_definition_in_float64(
    kernel: expert_order_cpu.CompiledOrder, case: tuple[Tensor, int], hidden: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts, width = case
    perm, inverse, counts = kernel.sort(experts, width)
    tokens, up = (torch.randn(len(experts), hidden, generator=generator).to(dtype) for _ in range(2))
    rows = torch.randn(experts.numel(), hidden, generator=generator).to(dtype)
    rows[int(counts.sum()) :] = torch.nan  # what no one may read
    gates = torch.rand(experts.shape, generator=generator)

    assert torch.equal(
        kernel.gather(tokens, perm, inverse, counts), expert_order_reference.gather(tokens, perm, inverse, counts)
    )
    found = kernel.combine(rows, inverse, gates).double()
    wanted = expert_order_reference.combine(rows.double(), inverse, gates.double())
    size = 1 + expert_order_reference.combine(rows.double().abs(), inverse, gates.double())
    assert ((found - wanted).abs() <= EPS[dtype] * size).all()
    plain = kernel.combine(rows, inverse, None).double()
    assert ((plain - expert_order_reference.combine(rows.double(), inverse, None)).abs() <= EPS[dtype] * 40).all()

    by_rows, by_gates = kernel.combine_gradient(up, rows, perm, inverse, counts, gates)
    exact = expert_order_reference.combine_gradient(up.double(), rows.double(), perm, inverse, counts, gates.double())
    assert ((by_rows.double() - exact[0]).abs() <= EPS[dtype] * (1 + exact[0].abs())).all()
    assert ((by_gates.double() - exact[1]).abs() <= 1e-5 * hidden).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_round_as_torch_does(kernel: expert_order_cpu.CompiledOrder, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None].repeat(1, 5)
    inverse = torch.arange(len(every), dtype=torch.int32)[:, None]
    for gate in (1.0, 0.7, 2.0**-14, 3.3):
        found = kernel.combine(every, inverse, torch.full((len(every), 1), gate))
        wanted = (every.float() * gate).to(dtype)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


def _layer(tokens: Tensor, gates: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """A mixture of linear experts."""
    order = moe_sort(experts, len(weights))
    rows = gather_tokens(tokens, order)
    parts = rows[: int(order.ends[-1])].split(order.counts.tolist())
    out = torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])
    return combine_tokens(F.pad(out, (0, 0, 0, len(rows) - len(out)), value=torch.nan), order, gates)


def test_gradients_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.tensor([[0, 2], [2, -1], [-1, -1], [1, 0], [2, 2]], dtype=torch.int32)
    tokens, gates, weights = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((5, 3), (5, 2), (3, 3, 3))
    )
    assert torch.autograd.gradcheck(lambda *leaves: _layer(*leaves, experts), (tokens, gates, weights))


def test_a_layer_is_the_sum_over_its_experts_and_native_as_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    experts = torch.randn(50, 8, generator=generator).topk(3).indices.int()
    values = [torch.randn(*shape, generator=generator) for shape in ((50, 20), (50, 3), (8, 20, 20))]
    results = []
    for mode in ("native", "reference"):
        monkeypatch.setenv("MEGACPT_KERNELS", mode)
        leaves = [value.clone().requires_grad_() for value in values]
        out = _layer(leaves[0], leaves[1], leaves[2], experts)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    tokens, gates, weights = values
    wanted = torch.einsum("th,tkhj,tk->tj", tokens, weights[experts.long()], gates)
    torch.testing.assert_close(results[0][0], wanted, atol=1e-4, rtol=1e-4)
    for native, reference in zip(*results, strict=True):
        torch.testing.assert_close(native, reference, atol=1e-3, rtol=1e-4)


def test_threads_change_no_bit() -> None:
    generator = torch.Generator().manual_seed(2)
    experts = torch.randint(-1, 16, (600, 4), generator=generator, dtype=torch.int32)
    tokens, gates = torch.randn(600, 130, generator=generator), torch.rand(600, 4, generator=generator)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            leaves = tokens.clone().requires_grad_(), gates.clone().requires_grad_()
            order = moe_sort(experts, 16)
            out = combine_tokens(gather_tokens(leaves[0], order).tanh(), order, leaves[1])
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiles_without_a_break_and_passes_opcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(-1, 4, (10, 2), generator=generator, dtype=torch.int32)
    order = moe_sort(experts, 4)
    tokens, gates = torch.randn(10, 6, generator=generator), torch.rand(10, 2, generator=generator)
    rows = gather_tokens(tokens, order)
    ops, leaf = torch.ops.megacpt, lambda value: value.clone().requires_grad_()
    torch.library.opcheck(ops.moe_sort.default, (experts, 4))
    torch.library.opcheck(ops.gather_tokens.default, (leaf(tokens), *order[:3]))
    torch.library.opcheck(ops.combine_tokens.default, (leaf(rows), *order[:3], leaf(gates)))
    torch.library.opcheck(ops.combine_tokens_gradient.default, (tokens, rows, *order[:3], gates))

    def there_and_back(tokens: Tensor, gates: Tensor) -> Tensor:
        order = moe_sort(experts, 4)
        return combine_tokens(gather_tokens(tokens, order).sin(), order, gates)

    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    leaves = leaf(tokens), leaf(gates)
    found, wanted = compiled(*leaves), there_and_back(*leaves)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_fit_is_said() -> None:
    experts = torch.zeros(3, 2, dtype=torch.int32)
    order = moe_sort(experts, 4)
    with pytest.raises(ValueError, match=r"experts must be \[T, k\] int32"):
        moe_sort(experts.long(), 4)
    with pytest.raises(ValueError, match=r"tokens must be \[3, H\]"):
        gather_tokens(torch.zeros(4, 5), order)
    with pytest.raises(ValueError, match=r"rows must be \[6, H\] and gates \[3, 2\]"):
        combine_tokens(torch.zeros(6, 5), order, torch.zeros(2, 3))
