"""Sinkhorn's algorithm: it ends, balances, and gives the same bits on any number of ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import megacpt.runtime  # noqa: F401  prepares megatron.core for import
from megacpt.ops import router_cpu, router_reference
from megacpt.ops.native import INSTRUCTION_SETS, instruction_set, library
from megacpt.ops.router import softmax_sums
from megacpt.ops.router_reference import PROBABILITY_ONE
from megacpt.ops.sinkhorn import improved, sinkhorn
from tests.pool import Pools


def skewed(tokens: int, experts: int, spread: float, skew: float, seed: int = 0) -> Tensor:
    """Logits that differ by token, and in favour of some experts."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(tokens, experts, generator=generator) * spread
    return own + torch.randn(experts, generator=generator) * skew


def load(logits: Tensor, log_u: Tensor, chosen: int) -> float:
    """The largest load of an expert over the mean one."""
    experts = (logits + log_u).topk(chosen, 1).indices
    counts = torch.bincount(experts.flatten(), minlength=logits.shape[1]).double()
    return float(counts.max() / counts.mean())


@pytest.mark.parametrize(
    ("experts", "chosen", "spread", "skew"), [(64, 6, 1, 0), (64, 1, 3, 3), (256, 8, 2, 2), (31, 3, 1, 1), (8, 1, 3, 3)]
)
def test_balances_in_a_few_iterations_where_megatron_takes_thousands(experts, chosen, spread, skew) -> None:
    logits = skewed(4096, experts, spread, skew)
    found = sinkhorn(logits)
    assert found.iterations <= 8
    assert found.log_u.isfinite().all()
    assert load(logits, found.log_u, chosen) <= 1.3


def test_large_and_infinite_logits_neither_overflow_nor_hang() -> None:
    logits = skewed(4096, 64, 1, 0)
    logits[5, 3] = 90
    logits[6, 4] = math.inf
    logits[7] = math.nan
    logits[8] = -math.inf
    logits[:, 9] = -math.inf
    found = sinkhorn(logits)
    assert found.iterations <= 8
    assert found.log_u.isfinite().all()
    good = torch.ones(4096, dtype=torch.bool)
    good[6:9] = False
    reachable = [e for e in range(64) if e != 9]
    assert load(logits[good][:, reachable], found.log_u[reachable], 1) <= 1.3


def test_a_warm_start_needs_no_more_than_a_look() -> None:
    logits = skewed(4096, 64, 2, 2)
    cold = sinkhorn(logits)
    assert cold.iterations > 2
    assert sinkhorn(logits, log_u=cold.log_u).iterations == 1


@pytest.mark.parametrize("chosen", [1, 6])
def test_the_rule_of_megatron_chooses_as_megatron_does(chosen: int) -> None:
    from megatron.core.transformer.moe import moe_utils

    logits = skewed(512, 16, 1, 0.3).double()
    theirs = moe_utils.sinkhorn(logits).topk(chosen, 1).indices
    ours = sinkhorn(logits, rule="megatron", tolerance=1e-4, most_iterations=1000)
    assert torch.equal((logits + ours.log_u.double()).topk(chosen, 1).indices.sort(1).values, theirs.sort(1).values)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_the_rule_of_megatron_finds_the_balanced_matrix_that_megatron_finds(dtype, tolerance) -> None:
    from megatron.core.transformer.moe import moe_utils

    logits = skewed(256, 16, 1, 0.3).to(dtype)
    theirs = moe_utils.sinkhorn(logits)
    ours = sinkhorn(logits, rule="megatron", tolerance=1e-4, most_iterations=1000)
    balanced = (logits.double() + ours.log_u.double()).softmax(1)
    torch.testing.assert_close(balanced, theirs.double() / theirs.double().sum(1, keepdim=True), atol=tolerance, rtol=0)


@pytest.mark.parametrize("rule", ["megatron", "neox3"])
def test_the_other_rules_are_bounded(rule: str) -> None:
    found = sinkhorn(skewed(1024, 64, 3, 3), rule=rule, tolerance=1e-4, most_iterations=20)  # type: ignore[arg-type]
    assert found.iterations <= 20
    assert found.log_u.isfinite().all()
    with pytest.raises(ValueError, match="balances the tokens of one rank"):
        sinkhorn(torch.zeros(4, 4), rule=rule, log_u=torch.zeros(4))  # type: ignore[arg-type]


def test_balanced_logits_need_no_more_than_a_look() -> None:
    found = sinkhorn(skewed(4096, 64, 0.3, 0))
    assert found.iterations == 1
    assert found.error <= 1e-2


@pytest.fixture(scope="module", params=range(instruction_set() + 1), ids=INSTRUCTION_SETS[: instruction_set() + 1])
def kernel(request: pytest.FixtureRequest) -> router_cpu.CompiledRouter:
    """The compiled functions, on each instruction set that this processor has."""
    return router_cpu.CompiledRouter(library(), request.param)


@st.composite
def tokens(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits with infinities, NaN and rows of -inf; a bias; a mask or none."""
    experts, rows = draw(st.sampled_from((1, 2, 8, 31, 64, 96, 256, 512, 2048))), draw(st.integers(0, 80))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(rows, experts, generator=generator) * draw(st.sampled_from((0.0, 1.0, 40.0)))
    for value in (math.nan, math.inf, -math.inf):
        if rows and draw(st.booleans()):
            logits[draw(st.integers(0, rows - 1)), draw(st.integers(0, experts - 1))] = value
    if rows and draw(st.booleans()):
        logits[draw(st.integers(0, rows - 1))] = -math.inf
    mask = torch.rand(rows, generator=generator) > 0.2 if draw(st.booleans()) else None
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    return logits.to(dtype), torch.randn(experts, generator=generator) * 3, mask


@settings(max_examples=100, deadline=None)
@given(case=tokens())
def test_column_sums_agree_with_the_definition_in_float64(kernel: router_cpu.CompiledRouter, case) -> None:
    logits, log_u, mask = case
    found = kernel.softmax_sums(logits, log_u, mask)
    wanted = router_reference.softmax_sums(logits.double(), log_u.double(), mask)
    assert ((found - wanted).abs().double() / PROBABILITY_ONE <= 1e-5 * max(len(logits), 1)).all()


@settings(max_examples=50, deadline=None)
@given(case=tokens())
def test_instruction_sets_give_the_same_bits(kernel: router_cpu.CompiledRouter, case) -> None:
    assert torch.equal(kernel.softmax_sums(*case), router_cpu.load().softmax_sums(*case))


@settings(max_examples=30, deadline=None)
@given(case=tokens(), most=st.integers(0, 8))
def test_one_call_gives_the_bits_of_single_steps(kernel: router_cpu.CompiledRouter, case, most: int) -> None:
    logits, log_u, mask = case
    current, made, error = log_u.double(), 0, 0.0
    while made < most and (made == 0 or error > 1e-3):
        current, error = improved(current, kernel.softmax_sums(logits, current.float(), mask))
        made += 1
    found = kernel.sinkhorn(logits, log_u.double(), mask, 1e-3, most)
    assert torch.equal(found[0], current)
    assert found[1:] == (made, error)
    assert current.isfinite().all()


def test_the_step_of_the_kernel_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    load = torch.tensor([0, 5 << 30, 1, 3 << 30, 2 << 30])
    start = torch.tensor([0.5, -1.0, 150.0, 0.0, -190.0])
    native = improved(start, load)
    monkeypatch.setenv("MEGACPT_KERNELS", "reference")
    reference = improved(start, load)
    torch.testing.assert_close(native[0], reference[0], atol=1e-12, rtol=1e-12)
    assert native[1] == pytest.approx(reference[1], rel=1e-12)


def test_threads_and_the_order_of_tokens_change_no_bit() -> None:
    logits = skewed(4096, 64, 2, 2)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(sinkhorn(logits if count == 1 else logits.flip(0)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].log_u, found[1].log_u)
    assert found[0][1:] == found[1][1:]
    parts = sum(softmax_sums(part, found[0].log_u, None) for part in logits.chunk(4))
    assert torch.equal(torch.as_tensor(parts), softmax_sums(logits, found[0].log_u, None))


def test_column_sums_pass_opcheck_and_compile_without_a_break() -> None:
    arguments = (skewed(40, 31, 1, 1), torch.zeros(31), None)
    torch.library.opcheck(torch.ops.megacpt.softmax_sums.default, arguments)
    compiled = torch.compile(lambda *given: softmax_sums(*given) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), softmax_sums(*arguments) * 2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_finds_the_same_bits(pools: Pools, ranks: int) -> None:
    alone = sinkhorn(skewed(1024, 31, 2, 2, seed=9))
    results = pools(ranks).run("tests.ops.cases:balanced", seed=9, tokens=1024, experts=31)
    assert all(result == (alone.log_u.tolist(), alone.iterations, alone.error) for result in results)
