"""Times the cross entropy, forward and backward: compiled kernel, torch reference, and torch's own function.

Run as ``python kernels/bench_cross_entropy.py``. The candidates take turns, so that a busy moment of the machine hits
all; printed are the best and the median time in milliseconds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megacpt.ops.cross_entropy import fused_cross_entropy
from megacpt.ops.dispatch import VARIABLE

SHAPES = ((2048, 384), (2048, 32000))
DTYPES = (torch.float32, torch.bfloat16)


def candidates(logits: Tensor, target: Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward passes over the same logits, by name."""
    weight = torch.full(target.shape, 1 / len(target))

    def step(loss: Callable[[Tensor], Tensor], values: Tensor) -> None:
        leaf = values.detach().requires_grad_()
        result = loss(leaf.view_as(leaf))
        torch.autograd.grad(result, leaf, weight.to(result.dtype))

    def ours(mode: str, values: Tensor) -> Callable[[], None]:
        def run() -> None:
            os.environ[VARIABLE] = mode
            step(lambda x: fused_cross_entropy(x, target), values)

        return run

    found: dict[str, Callable[[], object]] = {
        "kernel": ours("native", logits.clone()),  # of its own: they become their gradient
        "reference": ours("reference", logits.clone()),
        "torch": lambda: step(lambda x: F.cross_entropy(x.float(), target, reduction="none"), logits),
    }
    if logits.dtype is torch.bfloat16:
        found["torch, bfloat16 loss"] = lambda: step(lambda x: F.cross_entropy(x, target, reduction="none"), logits)
    return found


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> str:
    """Time the candidates in turn; `repeats` rounds after two for warming up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return "; ".join(f"{name} {min(t[2:]):.2f} / {statistics.median(t[2:]):.2f}" for name, t in times.items())


def main() -> None:
    """Print a line for each shape, dtype and number of threads."""
    torch.manual_seed(0)
    for rows, width in SHAPES:
        for dtype in DTYPES:
            logits = torch.randn(rows, width).mul_(3).to(dtype)
            target = torch.randint(0, width, (rows,))
            for threads in (1, 2):
                torch.set_num_threads(threads)
                line = measure(candidates(logits, target), repeats=200 if width < 1000 else 9)
                print(f"[{rows}, {width}] {str(dtype).removeprefix('torch.')}, {threads} threads: {line}", flush=True)


if __name__ == "__main__":
    main()
