"""Times ternary quantisation of all matrices of a model on the CPU, beside the same steps in eager torch.

Run as ``python kernels/bench_ternarise.py``. The candidates take turns in one process, so that a busy moment of the
machine hits all; printed are medians in milliseconds. "eager" is the quantiser as papers write it, "counted" also
counts zeros and flips, as the kernel does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, nn

from megacpt.config import QuantiseConfig
from megacpt.config.quantise import CacheForm
from megacpt.model.quantised import Quantiser, refresh
from megacpt.ops.ternarise import Blocks, block_abs_sums, ternarise

EPSILON = 1e-5
HIDDEN, FFN, LAYERS = 768, 2048, 14  # 99 million numbers


def matrices(layers: int) -> list[Tensor]:
    """Latent weights of a model, gate and up as one matrix."""
    shapes = ((3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (2 * FFN, HIDDEN), (HIDDEN, FFN))
    return [torch.randn(shape) * 0.02 for _ in range(layers) for shape in shapes]


@torch.no_grad()
def eager(weights: list[Tensor], outs: list[Tensor], counted: bool) -> list[Tensor]:
    """Scale, divide, clip, round and multiply, a matrix after the other."""
    counts = []
    for weight, out in zip(weights, outs, strict=True):
        gamma = (weight.abs().mean(dtype=torch.float64) + EPSILON).float()
        codes = (weight / gamma).clamp(-1, 1).round()
        if counted:
            counts.append(torch.stack(((codes == 0).sum(), (codes != out.sign()).sum())))
        out.copy_(codes * gamma)
    return counts


def fused(weights: list[Tensor], outs: list[Tensor]) -> Tensor:
    """The same, with counts, in two calls for all matrices."""
    sums = block_abs_sums(weights, [Blocks(1, 1, 1)] * len(weights))
    scales = [(total / weight.numel() + EPSILON).float() for total, weight in zip(sums, weights, strict=True)]
    return ternarise(weights, scales, outs)


def milliseconds(run: Callable[[], object]) -> float:
    """How long a run takes."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def forms(rounds: int) -> None:
    """Print how long it takes to quantise a matrix in each form of `quantised_cache`, and to have it for a product."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter((torch.randn(2048, 2048) * 0.02).to(dtype))
        shown = []
        for form in get_args(CacheForm):
            quantiser = Quantiser(weight, QuantiseConfig(grid="ternary"), form, 0)
            turns = [
                (milliseconds(lambda q=quantiser: refresh([q])), milliseconds(quantiser.cache.matrix))
                for _ in range(rounds + 1)
            ]
            made, used = (statistics.median(found) for found in zip(*turns[1:], strict=True))
            shown.append(f"{form} quantised in {made:.2f} ms, made in {used:.2f} ms")
        print(f"2048 x 2048, {str(dtype).removeprefix('torch.')}, 1 thread: {'; '.join(shown)}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="times ternary quantisation on the CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    weights = matrices(arguments.layers)
    print(f"{sum(weight.numel() for weight in weights) / 1e6:.0f} M numbers, float32 latent, torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        outs = {name: [torch.zeros_like(w, dtype=dtype) for w in weights] for name in ("eager", "counted", "fused")}
        runs: dict[str, Callable[[], object]] = {
            "eager": lambda outs=outs: eager(weights, outs["eager"], False),
            "counted": lambda outs=outs: eager(weights, outs["counted"], True),
            "fused": lambda outs=outs: fused(weights, outs["fused"]),
        }
        for threads in (1, 2):
            torch.set_num_threads(threads)
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(arguments.rounds + 1):
                for name, run in runs.items():
                    times[name].append(milliseconds(run))
            medians = {name: statistics.median(found[1:]) for name, found in times.items()}
            ratios = ", ".join(
                f"{name} / fused {medians[name] / medians['fused']:.2f}" for name in ("eager", "counted")
            )
            shown = ", ".join(f"{name} {median:.0f} ms" for name, median in medians.items())
            print(f"{str(dtype).removeprefix('torch.')}, {threads} threads: {shown}; {ratios}")
        assert all(map(torch.equal, outs["eager"], outs["fused"]))
    torch.set_num_threads(1)
    forms(arguments.rounds)


if __name__ == "__main__":
    main()
