"""Cross entropy: the reference against a scalar loop, the kernel against the reference, shards against the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megacpt.ops import cross_entropy_cpu, cross_entropy_reference
from megacpt.ops.cross_entropy import (
    cross_entropy_gradient,
    cross_entropy_gradient_,
    cross_entropy_partials,
    fused_cross_entropy,
    rescaled,
)
from megacpt.ops.native import INSTRUCTION_SETS, instruction_set, library
from tests.ops.cases import draw

DTYPES = (torch.float32, torch.bfloat16)
# Of the upstream gradient: float32 rounds exp, sum, quotient, product and difference; bfloat16 rounds the result.
EPS = {torch.float32: 3 * 2.0**-23, torch.bfloat16: 2.0**-8}
shapes = st.tuples(st.integers(1, 9), st.integers(1, 1200))
dtypes = st.sampled_from(DTYPES)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] of ordinary, extreme or equal size, targets and gradients of the losses."""
    rows, width = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    logits = (torch.rand(rows, width, generator=generator) * 2 - 1) * scale
    target = torch.randint(0, width, (rows,), generator=generator)
    return logits.to(draw(dtypes)), target, torch.randn(rows, generator=generator)


def run(op: Callable[..., Tensor], logits: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = op(leaf * 1, *arguments)
    loss.backward(weight.to(loss.dtype))
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.fixture(params=["native", "reference"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with the kernel, then with the reference."""
    monkeypatch.setenv("MEGACPT_KERNELS", request.param)
    return str(request.param)


@given(cases())
def test_reference_agrees_with_a_scalar_loop(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, weight = case[0].double(), case[1], case[2].double()
    loss, grad = run(fused_cross_entropy, logits, weight, target)
    for n, row in enumerate(logits[:3].tolist()):
        top = max(row)
        total = math.fsum(math.exp(x - top) for x in row)
        assert loss[n].item() == pytest.approx(math.log(total) + top - row[target[n]], rel=1e-12, abs=1e-12)
        for v in {0, int(target[n]), len(row) - 1}:
            softmax = math.exp(row[v] - top) / total
            expected = (softmax - (v == int(target[n]))) * weight[n].item()
            assert grad[n, v].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(cases())
def test_kernel_agrees_with_the_reference_in_float64(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, weight = case
    exact_loss, exact_grad = run(fused_cross_entropy, logits.double(), weight, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGACPT_KERNELS", "native")
        loss, grad = run(fused_cross_entropy, logits, weight, target)
    assert loss.dtype is torch.float32
    assert grad.dtype is logits.dtype
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=2e-6)
    bound = weight.abs()[:, None].double() * EPS[logits.dtype]
    assert ((grad.double() - exact_grad).abs() <= bound).all()


@pytest.mark.usefixtures("kernels")
def test_gradcheck() -> None:
    logits, target, _ = draw(1, 5, 7, torch.float64)
    target[2] = 9  # of another shard: see vocab_start
    assert torch.autograd.gradcheck(lambda x: fused_cross_entropy(x, target.clamp(max=6)), logits.requires_grad_())
    doubled = logits.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fused_cross_entropy(x * 2, target.clamp(max=6) + 3, 3), doubled)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    logits, target, weight = draw(2, 3, 21, dtype)
    torch.library.opcheck(cross_entropy_partials, (logits, target, 4))
    arguments = (logits, target, logits.float().amax(1), torch.full((3,), 7.0), weight, 4)
    torch.library.opcheck(cross_entropy_gradient, arguments)
    torch.library.opcheck(cross_entropy_gradient_, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_instruction_sets_change_no_bit(dtype: torch.dtype) -> None:
    logits, target, weight = draw(3, 700, 801, dtype)  # big enough to be split among threads
    threads = torch.get_num_threads()
    results = []
    try:
        for isa in range(instruction_set() + 1):
            kernel = cross_entropy_cpu.CompiledCrossEntropy(library(), isa)
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                partials = kernel.partials(logits, target, 0)
                out = torch.empty_like(logits)
                kernel.gradient(logits, target, partials[0], partials[1], weight, 0, out)
                results.append((f"{INSTRUCTION_SETS[isa]}, {count} threads", (*partials, out)))
    finally:
        torch.set_num_threads(threads)
    first = results[0][1]
    for name, result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True)), name


@given(case=cases(), shards=st.integers(2, 4))
def test_shards_join_to_the_whole(case: tuple[Tensor, Tensor, Tensor], shards: int) -> None:
    logits, target, _ = case
    width = -(-logits.shape[1] // shards)
    cuts = [(start, logits[:, start : start + width]) for start in range(0, logits.shape[1], width)]
    parts = [cross_entropy_partials(shard.contiguous(), target, start) for start, shard in cuts]
    top = torch.stack([part[0] for part in parts]).amax(0)
    sum_exp, target_logit = torch.stack([rescaled(part, top) for part in parts]).sum(0)
    whole = cross_entropy_partials(logits, target, 0)
    assert torch.equal(top, whole[0])
    assert torch.equal(target_logit, whole[2])
    torch.testing.assert_close(sum_exp, whole[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_process_group_joins_its_shards(pools: Any, dtype: torch.dtype) -> None:
    seed, tokens, width = 5, 6, 19
    logits, target, weight = draw(seed, tokens, 2 * width, dtype)
    loss, grad = run(fused_cross_entropy, logits, weight, target)
    arguments = {"seed": seed, "tokens": tokens, "width": width, "dtype": str(dtype).removeprefix("torch.")}
    answers = pools(2).run("tests.ops.cases:sharded_cross_entropy", **arguments)
    assert answers[0][0] == answers[1][0] == pytest.approx(loss.tolist(), rel=1e-6)
    joined = torch.cat([torch.tensor(shard) for _, shard in answers], 1)
    torch.testing.assert_close(joined, grad.float(), rtol=EPS[dtype], atol=1e-7)


@pytest.mark.usefixtures("kernels")
class TestStorage:
    """When the gradient takes the place of the logits."""

    def test_logits_become_their_gradient(self) -> None:
        logits, target, weight = draw(6, 4, 33, torch.float32)
        leaf = logits.requires_grad_()
        result = leaf * 1
        kept: list[Tensor] = []
        result.register_hook(kept.append)
        fused_cross_entropy(result.view(4, 33), target).backward(weight)
        assert kept[0].data_ptr() == result.data_ptr()

    def test_autograd_refuses_overwritten_logits(self) -> None:
        logits, target, weight = draw(6, 4, 33, torch.float32)
        result = logits.requires_grad_() * 1
        squares = result.square()  # saves the logits for its own backward pass
        fused_cross_entropy(result, target).backward(weight)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squares.sum().backward()

    def test_leaves_strided_kept_and_retained_logits_stay(self) -> None:
        logits, target, weight = draw(7, 4, 33, torch.float32)
        _, expected = run(fused_cross_entropy, logits, weight, target)
        leaf = logits.clone().requires_grad_()
        fused_cross_entropy(leaf, target).backward(weight)
        assert torch.equal(leaf.detach(), logits)
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, expected)
        strided = logits.t().contiguous().requires_grad_()
        for values, keep, retain in (
            ((strided * 1).t(), False, False),
            (leaf * 1, True, False),
            (leaf * 1, False, True),
        ):
            values.retain_grad()
            fused_cross_entropy(values, target, keep_logits=keep).backward(weight, retain_graph=retain)
            assert torch.equal(values.detach(), logits)
            assert values.grad is not None
            torch.testing.assert_close(values.grad, expected)

    def test_a_retained_graph_gives_the_same_gradient_twice(self) -> None:
        logits, target, weight = draw(8, 4, 33, torch.bfloat16)
        leaf = logits.requires_grad_()
        loss = fused_cross_entropy(leaf * 1, target)
        first = torch.autograd.grad(loss, leaf, weight, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(loss, leaf, weight)[0], first)


@pytest.mark.usefixtures("kernels")
class TestValues:
    """What special values, targets and shapes do."""

    def test_minus_infinity_contributes_nothing(self) -> None:
        logits, target, weight = draw(9, 4, 40, torch.float32)
        target %= 20
        masked = logits.clone()
        masked[:, 20:] = -torch.inf
        loss, grad = run(fused_cross_entropy, masked, weight, target)
        short_loss, short_grad = run(fused_cross_entropy, logits[:, :20].contiguous(), weight, target)
        torch.testing.assert_close(loss, short_loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad[:, :20], short_grad, rtol=1e-6, atol=1e-6)
        assert (grad[:, 20:] == 0).all()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("column", [0, 17, 39])
    def test_what_is_not_finite_is_not_hidden(self, bad: float, column: int) -> None:
        logits, target, weight = draw(9, 4, 40, torch.float32)
        logits[2, column] = bad
        loss, grad = run(fused_cross_entropy, logits, weight, target)
        assert loss.isfinite().tolist() == [True, True, False, True]
        assert not grad[2].isfinite().all()
        assert grad[[0, 1, 3]].isfinite().all()

    def test_a_shard_of_minus_infinity_is_empty(self) -> None:
        logits = torch.full((2, 5), -torch.inf)
        row_max, sum_exp, target_logit = cross_entropy_partials(logits, torch.tensor([7, 8]), 0)
        sums = rescaled((row_max, sum_exp, target_logit), torch.zeros(2))
        assert row_max.tolist() == [-torch.inf] * 2
        assert sums.tolist() == [[0.0, 0.0], [0.0, 0.0]]

    def test_no_tokens(self) -> None:
        loss, grad = run(fused_cross_entropy, torch.empty(0, 9), torch.empty(0), torch.empty(0, dtype=torch.int64))
        assert loss.shape == (0,)
        assert grad.shape == (0, 9)

    @pytest.mark.parametrize("wrong", [-1, 40])
    def test_targets_outside_the_vocabulary(self, wrong: int) -> None:
        logits, target, _ = draw(9, 4, 40, torch.float32)
        target[1] = wrong
        with pytest.raises(IndexError, match="outside the vocabulary, 0 to 39"):
            fused_cross_entropy(logits, target)

    def test_wrong_shapes_and_dtypes(self) -> None:
        logits, target, _ = draw(9, 4, 40, torch.float32)
        for bad_logits, bad_target in ((logits[None], target), (logits, target[:2]), (logits, target.int())):
            with pytest.raises(ValueError, match="must be"):
                fused_cross_entropy(bad_logits, bad_target)
        with pytest.raises(ValueError, match="floating point"):
            fused_cross_entropy(logits.int(), target)


def test_reference_in_blocks_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target, weight = draw(10, 11, 30, torch.float64)
    whole = run(fused_cross_entropy, logits, weight, target)
    monkeypatch.setattr(cross_entropy_reference, "_BLOCK", 64)
    blocks = run(fused_cross_entropy, logits, weight, target)
    assert all(torch.equal(a, b) for a, b in zip(whole, blocks, strict=True))
