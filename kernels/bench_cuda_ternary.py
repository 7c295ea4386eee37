"""The lines of `bench_cuda.py` for ternary matrices: products, quantisation, and a layer's training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BANDWIDTH = 4.3e12  # bytes a second that a copy reaches on an H200
BFLOAT16 = 770e12  # operations a second that its products reach
LAUNCH = 2.5e-6  # seconds that one launch takes in a graph
L2 = 150e6  # bytes, more than any L2 cache holds
STEPS = 8  # microbatches of an optimizer step
Run = Callable[[], object]


class Timer(Protocol):
    """Gives the median time of one of several runs that take turns, in microseconds."""

    def __call__(self, runs: list[Run]) -> float:
        """Time them."""
        ...


@dataclass(frozen=True)
class Case:
    """A line of the table.

    Attributes:
        op: which one.
        shape: tokens, rows and columns.
        goal: how many times as fast as the anchor it should be.
    """

    op: str
    shape: tuple[int, int, int]
    goal: float | None = None

    @property
    def floor(self) -> float:
        """Microseconds that the bytes, the operations or a launch take, whichever is longest."""
        tokens, rows, columns = self.shape
        weights = rows * columns
        if self.op == "ternarise":
            seconds = weights * (4 + 4 + 2 + 2) / BANDWIDTH  # the weights twice, what was there, the values
        elif self.op == "training step":
            seconds = STEPS * 6 * tokens * weights / BFLOAT16
        else:
            seconds = max(weights / 4 / BANDWIDTH, 2 * tokens * weights / BFLOAT16)
        return 1e6 * max(LAUNCH, seconds)


LARGE = (28672, 8192)
CASES = (
    *(Case("packed linear", (1, *shape)) for shape in ((4096, 4096), (11008, 4096), (8192, 8192))),
    Case("packed linear", (1, *LARGE), 6),
    Case("packed linear", (16, *LARGE), 5),
    Case("packed linear", (64, *LARGE), 2.5),
    Case("packed linear", (256, *LARGE), 0.95),
    Case("packed linear", (4096, *LARGE), 0.95),
    Case("packed linear, fp8", (4096, *LARGE), 0.95),
    Case("ternarise", (0, 11008, 4096)),
    Case("training step", (4096, 11008, 4096), 0.98),
)


def section(cases: list[str]) -> list[str]:
    """The part of BENCH.md with these lines."""
    return [
        "## Ternary matrices",
        "",
        "Weights packed in 2 bits, or float32 latent weights quantised to bfloat16; activations bfloat16; times",
        "in microseconds. The floor is the packed weights at 4.3 TB/s, the products at 770 TFLOP/s or one launch",
        "(2.5 us). The anchor of products is cuBLAS with a dense bfloat16 matrix, that of `ternarise` the same",
        f"steps in eager torch, and that of a training step (forward and backward passes of {STEPS} microbatches,",
        "and one quantisation) the same without quantisation. The goal is how many times as fast as the anchor",
        "it should be on an H200.",
        "",
        "| op | tokens, o, i | floor | goal | measured | / floor | anchor | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *cases,
        "",
    ]


def line(case: Case, ours: float | None, theirs: float | None) -> str:
    """A row of the table; what was not measured is None."""
    shape = ", ".join(map(str, case.shape[case.shape[0] == 0 :]))
    columns = [case.op, shape, f"{case.floor:.1f}", "-" if case.goal is None else f"{case.goal}"]
    if ours is None or theirs is None:
        return "| " + " | ".join([*columns, "not yet measured", "-", "-", "-"]) + " |"
    measured = [f"{ours:.1f}", f"{ours / case.floor:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}"]
    return "| " + " | ".join([*columns, *measured]) + " |"


def measure(case: Case, replayed: Timer) -> tuple[float, float]:
    """Our time and the anchor's, in microseconds."""
    return {"ternarise": quantisation, "training step": training}.get(case.op, product)(case, replayed)


def product(case: Case, replayed: Timer) -> tuple[float, float]:
    """A product beside cuBLAS's with the dense matrix."""
    from megacpt.ops import packed_linear_cuda
    from megacpt.ops.packed_matrix import pack_matrix

    tokens, rows, columns = case.shape
    linear, scale = packed_linear_cuda.load(), torch.full((1, 1), 0.02, device="cuda")
    x = torch.randn(tokens, columns, device="cuda").bfloat16()

    def drawn() -> Tensor:
        return torch.randint(-1, 2, (rows, columns), device="cuda", dtype=torch.int8)

    packed = [
        pack_matrix(drawn(), scale.expand(rows, 1).contiguous()) for _ in range(max(2, int(4 * L2 / (rows * columns))))
    ]
    activations = "fp8" if case.op.endswith("fp8") else "float"
    ours = replayed([lambda m=m: linear.packed_linear(x, m, activations) for m in packed])
    dense = [drawn().bfloat16() for _ in range(max(2, int(L2 / (2 * rows * columns))))]
    return ours, replayed([lambda w=w: x @ w.T for w in dense])


def quantisation(case: Case, replayed: Timer) -> tuple[float, float]:
    """Sums, scales and values of a matrix beside eager torch."""
    weights = [torch.randn(case.shape[1:], device="cuda") * 0.02 for _ in range(2)]
    outs = [torch.zeros_like(weight, dtype=torch.bfloat16) for weight in weights]
    ours = replayed([lambda w=w, out=out: quantised(w, out) for w, out in zip(weights, outs, strict=True)])
    return ours, replayed([lambda w=w, out=out: eager(w, out) for w, out in zip(weights, outs, strict=True)])


def quantised(weight: Tensor, out: Tensor) -> Tensor:
    """One matrix, as the layers do it once a step."""
    from megacpt.ops.ternarise import Blocks, block_abs_sums, ternarise

    (total,) = block_abs_sums([weight], [Blocks(1, 1)])
    return ternarise([weight], [(total / weight.numel() + 1e-5).float()], [out])


def eager(weight: Tensor, out: Tensor) -> Tensor:
    """The same as papers write it, with counts."""
    gamma = (weight.abs().mean(dtype=torch.float64) + 1e-5).float()
    codes = (weight / gamma).clamp(-1, 1).round()
    counts = torch.stack(((codes == 0).sum(), (codes != out.sign()).sum()))
    out.copy_(codes * gamma)
    return counts


def training(case: Case, replayed: Timer) -> tuple[float, float]:
    """All passes of a layer in an optimizer step, with and without one quantisation."""
    tokens, rows, columns = case.shape
    weight = torch.randn(rows, columns, device="cuda") * 0.02
    out, x, up = (
        torch.randn(shape, device="cuda").bfloat16() for shape in ((rows, columns), (tokens, columns), (tokens, rows))
    )

    def passes() -> None:
        for _ in range(STEPS):
            x @ out.T, up @ out, up.T @ x

    def step() -> None:
        quantised(weight, out)
        passes()

    return replayed([step]), replayed([passes])
