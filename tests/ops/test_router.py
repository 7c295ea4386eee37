"""The router: its definition against autograd and Megatron Core, the kernel against its definition."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import megacpt.runtime  # noqa: F401  prepares megatron.core for import
from megacpt.ops import balance, router_cpu, router_reference
from megacpt.ops.native import INSTRUCTION_SETS, instruction_set, library
from megacpt.ops.router import choose_experts, gated
from megacpt.ops.router_reference import PROBABILITY_ONE, Z_ONE, Scoring
from tests.ops.scorings import scorings

EXPERTS = (1, 2, 8, 31, 64, 96, 256, 512)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of a result near 1: float32 accumulates some roundings, the others round the result to their own precision.
EPS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@st.composite
def tokens(draw: st.DrawFn) -> tuple[Tensor, Scoring, Tensor | None]:
    """Logits with ties, infinities, NaN and equal rows; a scoring; a mask or none."""
    experts = draw(st.sampled_from(EXPERTS))
    rows = draw(st.integers(0, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(rows, experts, generator=generator) * draw(st.sampled_from((0.0, 1.0, 30.0)))
    if draw(st.booleans()):
        logits = logits.round()
    for value in (math.nan, math.inf, -math.inf):
        if rows and draw(st.booleans()):
            logits[draw(st.integers(0, rows - 1)), draw(st.integers(0, experts - 1))] = value
    if rows and draw(st.booleans()):
        logits[draw(st.integers(0, rows - 1))] = -math.inf
    mask = torch.rand(rows, generator=generator) > 0.3 if draw(st.booleans()) else None
    return logits.to(draw(st.sampled_from(DTYPES))), draw(scorings(experts, most=64)), mask


@pytest.fixture(scope="module", params=range(instruction_set() + 1), ids=INSTRUCTION_SETS[: instruction_set() + 1])
def kernel(request: pytest.FixtureRequest) -> router_cpu.CompiledRouter:
    """The compiled router, on each instruction set that this processor has."""
    return router_cpu.CompiledRouter(library(), request.param)


@settings(max_examples=150, deadline=None)
@given(case=tokens())
def test_kernel_agrees_with_the_definition_in_float64(kernel: router_cpu.CompiledRouter, case) -> None:
    logits, scoring, mask = case
    found = kernel.route(logits, None, mask, scoring)
    wanted = router_reference.route(logits.double(), None, mask, scoring)
    # Groups are ranked by sums of scores, whose ties and roundings differ from float64's: compare where they agree.
    same = (found.experts == wanted.experts).all(1)
    if scoring.groups == 1:
        assert same.all()
        assert torch.equal(found.counts, wanted.counts)
    torch.testing.assert_close(found.gates[same].double(), wanted.gates[same], atol=2e-6, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(found.lse.double(), wanted.lse, atol=1e-5, rtol=1e-6, equal_nan=True)
    error = (found.prob_sum - wanted.prob_sum).abs().double() / PROBABILITY_ONE
    assert (error <= 1e-6 * len(logits)).all()
    assert abs(int(found.z_sum) - int(wanted.z_sum)) / Z_ONE <= 1e-4 * len(logits) + 1e-5 * int(wanted.z_sum) / Z_ONE


@settings(max_examples=150, deadline=None)
@given(case=tokens(), seed=st.integers(0, 2**32))
def test_kernel_gradient_agrees_with_the_definition_in_float64(
    kernel: router_cpu.CompiledRouter, case, seed: int
) -> None:
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
    size = 1 + up.abs().sum(1, keepdim=True) * scoring.scale
    size = size + 2 * exact.abs().nan_to_num()[:, None] * (1 + coefficients[1].abs())
    error = (found - wanted).abs() / size
    assert (found.isnan() == wanted.isnan()).all()
    assert (error.nan_to_num() <= 4 * EPS[logits.dtype]).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("chosen", "groups", "kept"), [(1, 1, 1), (3, 1, 1), (8, 1, 1), (4, 4, 2)])
def test_the_gradient_of_the_definition_is_that_of_autograd(score, renormalise, chosen, groups, kept) -> None:
    generator = torch.Generator().manual_seed(3)
    scoring = Scoring(chosen, score, renormalise, 1.7, groups=groups, groups_kept=kept)
    logits = (torch.randn(9, 8, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    up = torch.randn(9, chosen, generator=generator, dtype=torch.float64)
    c, z = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (8, 1))
    routing = router_reference.route(logits, None, None, scoring)
    scores = logits.softmax(1) if score == "softmax" else logits.sigmoid()
    probabilities = scores / scores.sum(1, keepdim=True)
    loss = (routing.gates * up).sum() + (probabilities * c).sum() + (z * logits.logsumexp(1).square()).sum()
    loss.backward()
    assert logits.grad is not None
    found = router_reference.gradient(logits.detach(), routing.lse.detach(), routing.experts, up, c, z, scoring)
    torch.testing.assert_close(found, logits.grad, atol=1e-12, rtol=1e-10)


def test_ties_go_to_the_lower_index_and_a_bias_moves_the_choice_alone() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, -0.0, 0.0, 0.0]])
    routing = choose_experts(logits, Scoring(2))
    assert routing.experts.tolist() == [[1, 2], [0, 1]]
    biased = choose_experts(
        logits, Scoring(2, renormalise=False, bias_on_logits=True), bias=torch.tensor([9.0, 0, 0, 0])
    )
    assert biased.experts.tolist() == [[0, 1], [0, 1]]
    torch.testing.assert_close(biased.gates, logits.softmax(1)[:, :2])


def test_what_a_token_without_meaning_gets() -> None:
    logits = torch.tensor([[math.nan, 1.0, 2.0], [math.inf, 0.0, 0.0], [-math.inf] * 3, [1.0, -math.inf, 3.0]])
    routing = choose_experts(logits, Scoring(2), mask=torch.tensor([True, True, False, True]))
    assert routing.experts.tolist() == [[0, 1], [0, 1], [-1, -1], [2, 0]]
    assert routing.gates[:2].isnan().all()
    assert routing.gates[2].tolist() == [0, 0]
    assert routing.counts.tolist() == [3, 2, 1]
    assert int(routing.prob_sum.sum()) == pytest.approx(PROBABILITY_ONE, rel=1e-6)  # the last token alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [31, 64])
def test_sums_do_not_depend_on_threads_order_or_ranks(dtype: torch.dtype, experts: int) -> None:
    logits = torch.randn(4096, experts, generator=torch.Generator().manual_seed(1)).to(dtype)
    scoring = Scoring(3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = choose_experts(logits, scoring)
        torch.set_num_threads(2)
        two = choose_experts(logits, scoring)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for ranks in (2, 4):
        parts = [choose_experts(part, scoring) for part in logits.flip(0).chunk(ranks)]
        for name in ("counts", "prob_sum", "z_sum"):
            assert torch.equal(sum(getattr(part, name) for part in parts), getattr(one, name))


def _through(mode: str, monkeypatch: pytest.MonkeyPatch, logits: Tensor, scoring: Scoring, up: Tensor) -> Tensor:
    monkeypatch.setenv("MEGACPT_KERNELS", mode)
    leaf = logits.clone().requires_grad_()
    gates = gated(leaf, choose_experts(leaf, scoring), torch.ones(logits.shape[1]), torch.ones(1), scoring)
    gates.backward(up)
    assert leaf.grad is not None
    return leaf.grad


def test_kernel_and_reference_are_chosen_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, up = torch.randn(16, 8, generator=generator), torch.randn(16, 2, generator=generator)
    native = _through("native", monkeypatch, logits, Scoring(2), up)
    reference = _through("reference", monkeypatch, logits, Scoring(2), up)
    torch.testing.assert_close(native, reference, atol=1e-6, rtol=1e-5)


def test_compiles_without_a_break_and_passes_opcheck() -> None:
    scoring = Scoring(2, "sigmoid")
    logits = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    numbers = (2, True, True, 1.0, False, 1, 1)
    torch.library.opcheck(torch.ops.megacpt.route.default, (logits, None, None, *numbers))
    routing = choose_experts(logits, scoring)
    arguments = (routing.gates, routing.experts, routing.lse, torch.ones(8), torch.ones(1))
    torch.library.opcheck(torch.ops.megacpt.gated.default, (logits.clone().requires_grad_(), *arguments, *numbers))

    def gates(x: Tensor) -> Tensor:
        return gated(x, choose_experts(x, scoring), torch.ones(8), torch.ones(1), scoring)

    compiled: Callable[[Tensor], Tensor] = torch.compile(gates, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), gates(logits))


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        (Scoring(9), "top_k is 9"),
        (Scoring(2, groups=3), "3 groups of which 1 are kept do not fit 8 experts"),
        (Scoring(4, groups=4, groups_kept=1), "must be 1 times a number of experts that a group has"),
    ],
)
def test_what_does_not_fit_is_said(scoring: Scoring, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_experts(torch.zeros(2, 8), scoring)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("pre", [True, False])
def test_gates_and_losses_are_megatrons(dtype: torch.dtype, tolerance: float, pre: bool) -> None:
    from megatron.core.transformer.moe import moe_utils

    count, experts, chosen, alpha, beta = 64, 16, 3, 0.02, 0.001
    values = torch.randn(count, experts, generator=torch.Generator().manual_seed(5), dtype=dtype) * 2
    up = torch.randn(count, experts, generator=torch.Generator().manual_seed(6), dtype=dtype)

    theirs = values.clone().requires_grad_()
    dense, chosen_map = moe_utils.topk_routing_with_score_function(theirs, chosen, use_pre_softmax=pre)
    aux = moe_utils.switch_load_balancing_loss_func(theirs.softmax(1), chosen_map.sum(0), count, chosen, experts, alpha)
    z = moe_utils.z_loss_func(theirs, beta)
    # A mean over tokens stands beside a loss that is a sum over tokens.
    ((dense * up).sum() + count * (aux + z)).backward()

    scoring = Scoring(chosen, renormalise=not pre)
    ours = values.clone().requires_grad_()
    routing = choose_experts(ours, scoring)
    fractions = balance.assignments(routing.counts)
    coefficients = balance.balance_coefficients(fractions, alpha).to(dtype), torch.tensor([beta], dtype=dtype)
    gates = gated(ours, routing, *coefficients, scoring)
    gates.backward(up.gather(1, routing.experts.long()))

    torch.testing.assert_close(gates, dense.gather(1, routing.experts.long()), atol=tolerance, rtol=tolerance)
    assert torch.equal(routing.counts, chosen_map.sum(0))
    found = balance.balance_loss(fractions, routing.prob_sum, count, alpha), balance.z_loss(routing.z_sum, count, beta)
    torch.testing.assert_close(torch.stack(found), torch.stack((aux, z)).double(), atol=tolerance, rtol=tolerance)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, atol=tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_losses_over_sequences_and_over_ranks_are_megatrons(dtype: torch.dtype, tolerance: float, scope: str) -> None:
    from megatron.core.transformer.moe import moe_utils

    length, sequences, experts, chosen, alpha = 32, 3, 16, 2, 0.05
    tokens = length * sequences
    values = torch.randn(length, sequences, experts, generator=torch.Generator().manual_seed(8), dtype=dtype) * 2
    elsewhere = torch.randint(0, 40, (experts,), generator=torch.Generator().manual_seed(9))

    theirs = values.clone().requires_grad_()
    probabilities = theirs.flatten(0, 1).softmax(1)
    _, chosen_map = moe_utils.topk_routing_with_score_function(theirs.flatten(0, 1), chosen)
    if scope == "sequence":
        by_sequence = probabilities.view(length, -1), chosen_map.view(length, -1).sum(0)
        aux = moe_utils.switch_load_balancing_loss_func(*by_sequence, length, chosen, experts, alpha) / sequences
    else:
        counts = chosen_map.sum(0) + elsewhere
        together = int(counts.sum()) / chosen
        aux = moe_utils.switch_load_balancing_loss_func(probabilities, counts, together, chosen, experts, alpha)
        aux = aux * together / tokens  # a mean over this rank's tokens instead of all
    (tokens * aux).backward()

    ours, found, scoring = values.clone().requires_grad_(), [], Scoring(chosen)
    for part in ours.unbind(1) if scope == "sequence" else [ours.flatten(0, 1)]:
        routing = choose_experts(part, scoring)
        fractions = balance.assignments(routing.counts + (elsewhere if scope == "global" else 0))
        coefficients = balance.balance_coefficients(fractions, alpha).to(dtype)
        gates = gated(part, routing, coefficients, torch.zeros(1, dtype=dtype), scoring)
        gates.backward(torch.zeros_like(gates), retain_graph=True)
        found.append(balance.balance_loss(fractions, routing.prob_sum, len(part), alpha))
    torch.testing.assert_close(torch.stack(found).mean(), aux.double(), atol=tolerance, rtol=tolerance)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, atol=tolerance, rtol=10 * tolerance)
