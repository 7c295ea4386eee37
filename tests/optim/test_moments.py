"""Running means over a boundary: their ages, and steps that follow from them, against float64 references."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from megacpt.optim.adam import FusedAdamW
from megacpt.optim.lion import Lion
from megacpt.optim.moments import Carry

decays = st.floats(0.5, 0.9999)
factors = st.floats(0.001, 1.0)
ages = st.one_of(st.integers(1, 2000).map(float), st.floats(0.01, 2000))


def _mass(decay: float, count: float) -> float:
    return -math.expm1(count * math.log(decay))


@given(ages, factors, decays, decays)
def test_the_mass_of_the_past_is_multiplied_by_the_factor(
    count: float, factor: float, before: float, after: float
) -> None:
    carried = Carry(factor, before, after).count(count)
    assert _mass(after, carried) == pytest.approx(factor * _mass(before, count), rel=1e-9, abs=1e-15)


@given(ages, factors, factors, decays)
def test_two_boundaries_are_one_with_both_factors(count: float, first: float, second: float, decay: float) -> None:
    twice = Carry(second, decay, decay).count(Carry(first, decay, decay).count(count))
    assert _mass(decay, twice) == pytest.approx(first * second * _mass(decay, count), rel=1e-9)


@given(ages, decays)
def test_what_is_kept_stays_to_the_last_bit(count: float, decay: float) -> None:
    assert Carry(1.0, decay, decay).count(count) == count
    assert Carry(0.0, decay, decay).count(count) == 0.0
    assert Carry(0.5, decay, decay).count(0.0) == 0.0


def test_means_without_memory() -> None:
    assert Carry(1.0, 0.0, 0.0).count(7.0) == 7.0
    assert Carry(0.5, 0.9, 0.0).count(7.0) == 0.0
    full = Carry(1.0, 0.0, 0.9).count(7.0)  # the last gradient, as a mean of all
    assert math.isfinite(full)
    assert _mass(0.9, full) == 1.0
    assert _mass(0.9, Carry(0.5, 0.0, 0.9).count(7.0)) == pytest.approx(0.5)


@dataclass
class Reference:
    """AdamW and Lion in float64, with the mass of each mean beside it."""

    weight: Tensor
    kind: str
    betas: tuple[float, float]
    eps: float = 1e-8

    def __post_init__(self) -> None:
        self.weight = self.weight.detach().double()
        self.means = {"exp_avg": torch.zeros_like(self.weight), "exp_avg_sq": torch.zeros_like(self.weight)}
        self.masses = {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def _add(self, name: str, decay: float, value: Tensor) -> None:
        self.means[name] = decay * self.means[name] + (1 - decay) * value
        self.masses[name] = decay * self.masses[name] + (1 - decay)

    def carry(self, factors: dict[str, float]) -> None:
        for name, factor in factors.items():
            self.means[name] = self.means[name] * factor
            self.masses[name] *= factor
        if self.masses["exp_avg"] and not self.masses["exp_avg_sq"] and self.kind == "adamw":
            self._add("exp_avg_sq", self.betas[1], (self.means["exp_avg"] / self.masses["exp_avg"]) ** 2)

    def step(self, gradient: Tensor, rate: float, decay: float) -> None:
        g, (beta1, beta2) = gradient.double(), self.betas
        if self.kind == "lion":
            direction = torch.sign(beta1 * self.means["exp_avg"] + (1 - beta1) * g)
            self.weight = self.weight - rate * (direction + decay * self.weight)
            self._add("exp_avg", beta2, g)
            return
        self._add("exp_avg", beta1, g)
        self._add("exp_avg_sq", beta2, g * g)
        mean, square = (self.means[name] / self.masses[name] for name in ("exp_avg", "exp_avg_sq"))
        self.weight = self.weight * (1 - rate * decay) - rate * mean / (square.sqrt() + self.eps)


KINDS = {"adamw": FusedAdamW, "lion": Lion}
BETAS = {"adamw": (0.9, 0.95), "lion": (0.9, 0.99), "slow": (0.8, 0.999)}
# Kinds and decays of three stages, and what each of the two boundaries keeps of both means.
LINEAGES: dict[str, tuple[Sequence[tuple[str, str]], Sequence[tuple[float, float]]]] = {
    "kept": ([("adamw", "adamw")] * 3, [(1, 1), (1, 1)]),
    "reset": ([("adamw", "adamw")] * 3, [(0, 0), (0, 0)]),
    "first reset": ([("adamw", "adamw")] * 3, [(0, 1), (0, 1)]),
    "second reset": ([("adamw", "adamw")] * 3, [(1, 0), (1, 0)]),
    "decayed": ([("adamw", "adamw")] * 3, [(0.5, 0.1), (0.9, 0.3)]),
    "other decays": ([("adamw", "adamw"), ("adamw", "slow"), ("adamw", "adamw")], [(1, 1), (1, 0.5)]),
    "lion and back": ([("adamw", "adamw"), ("lion", "lion"), ("adamw", "adamw")], [(1, 1), (1, 0)]),
    "lion decayed": ([("lion", "lion"), ("lion", "lion"), ("adamw", "slow")], [(0.25, 1), (0.5, 0)]),
}


def _moved(optimizer: FusedAdamW | Lion, into: type[FusedAdamW] | type[Lion], betas: Any, keep: Any) -> Any:
    """Go on with another optimizer over a boundary, as the engine does."""
    (weight,) = optimizer.parameters()
    old = optimizer.param_groups[0]["betas"]
    made = into([weight], lr=0.0, betas=betas)
    made.create_state()
    decay = {FusedAdamW: {"exp_avg": 0, "exp_avg_sq": 1}, Lion: {"exp_avg": 1}}
    carries = {}
    for place, moment in enumerate(made.MOMENTS):
        if moment not in optimizer.MOMENTS:
            continue
        made.state[weight][moment].copy_(optimizer.state[weight][moment])
        made.counts[weight][moment] = optimizer.counts[weight][moment]
        carries[moment] = Carry(keep[place], old[decay[type(optimizer)][moment]], betas[decay[into][moment]])
    made.carry(carries)
    return made


@pytest.mark.parametrize("name", LINEAGES)
def test_steps_over_boundaries_are_those_of_the_reference(name: str) -> None:
    stages, boundaries = LINEAGES[name]
    torch.manual_seed(3)
    weight = nn.Parameter(torch.randn(7, 33))
    optimizer: Any = None
    reference: Any = None
    for number, (kind, betas) in enumerate(stages):
        if optimizer is None:
            optimizer = KINDS[kind]([weight], lr=0.0, betas=BETAS[betas])
            optimizer.create_state()
            reference = Reference(weight, kind, BETAS[betas])
        else:
            keep = boundaries[number - 1]
            optimizer = _moved(optimizer, KINDS[kind], BETAS[betas], keep)
            second = keep[1] if stages[number - 1][0] == kind == "adamw" else 0.0
            reference.kind, reference.betas = kind, BETAS[betas]
            reference.carry({"exp_avg": keep[0], "exp_avg_sq": second})
        for _ in range(5):
            weight.grad = torch.randn(7, 33) * 0.3
            optimizer.param_groups[0].update(lr=1e-2, weight_decay=0.1)
            optimizer.step()
            reference.step(weight.grad, 1e-2, 0.1)
            torch.testing.assert_close(weight.detach().double(), reference.weight, rtol=0, atol=2e-6)


def test_without_a_boundary_it_is_torchs_adamw_to_the_last_bit() -> None:
    torch.manual_seed(4)
    ours = nn.Parameter(torch.randn(1000))
    theirs = copy.deepcopy(ours)
    settings: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer, torchs = FusedAdamW([ours], **settings), torch.optim.AdamW([theirs], fused=True, **settings)
    optimizer.create_state()
    for _ in range(30):
        ours.grad = torch.randn(1000)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        torchs.step()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_different_ages_do_not_mix(kind: str) -> None:
    """One that joins later is updated as if it were alone."""
    torch.manual_seed(5)
    old, young = (nn.Parameter(torch.randn(50)) for _ in range(2))
    alone = copy.deepcopy(young)
    both, single = KINDS[kind]([old, young], lr=1e-2), KINDS[kind]([alone], lr=1e-2)
    both.create_state()
    single.create_state()
    for _ in range(4):
        old.grad = torch.randn(50)
        both.step()
    assert [both.counts[p]["exp_avg"] for p in (old, young)] == [4.0, 0.0]
    for _ in range(3):
        old.grad, young.grad = torch.randn(50), torch.randn(50)
        alone.grad = young.grad.clone()
        both.step()
        single.step()
        assert torch.equal(young, alone)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_a_reset_second_moment_makes_no_giant_steps_where_the_gradient_is_0(beta2: float) -> None:
    """As for rows of the embedding whose tokens the next batches lack."""
    torch.manual_seed(6)
    weight = nn.Parameter(torch.zeros(100))
    optimizer = FusedAdamW([weight], lr=1e-2, betas=(0.9, beta2), weight_decay=0.0)
    optimizer.create_state()
    for _ in range(50):
        weight.grad = torch.randn(100)
        optimizer.step()
    optimizer.carry({"exp_avg": Carry(1.0, 0.9, 0.9), "exp_avg_sq": Carry(0.0, beta2, beta2)})
    for _ in range(20):
        before = weight.detach().clone()
        weight.grad = torch.zeros(100)
        optimizer.step()
        assert (weight - before).abs().max() < 2e-2


def test_lions_steps_have_one_size() -> None:
    weight = nn.Parameter(torch.zeros(20))
    optimizer = Lion([weight], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    optimizer.create_state()
    weight.grad = torch.linspace(-1, 1, 20)
    optimizer.step()
    assert torch.equal(weight.detach(), -1e-2 * torch.sign(weight.grad))
