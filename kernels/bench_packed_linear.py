"""Times products with packed ternary and with 16-bit matrices, beside torch's products with dense ones.

Run as ``python kernels/bench_packed_linear.py``. The candidates take turns in one process, call by call, so that a busy
moment of the machine hits all of them, and none finds its weights in a cache that the others have gone through. Printed
are the best and the median time in milliseconds, and how often ours fits into torch's, by medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from megacpt.ops import packed_linear_cpu
from megacpt.ops.half_linear import half_linear
from megacpt.ops.native import library
from megacpt.ops.packed_linear import pack_matrix

Sides = dict[str, Callable[[], object]]
SHAPES = ((11008, 4096), (4096, 11008), (2048, 2048))  # rows and columns
HEADS = ((32000, 2048),)
TOKENS = (1, 4, 16, 64)
TORCH = ("torch float32", "torch bfloat16")


def packed(o: int, i: int, tokens: int, variant: int) -> Sides:
    """The product with a packed matrix, on an instruction set, and torch's with the dense matrix."""
    codes, scale = torch.randint(-1, 2, (o, i), dtype=torch.int8), 0.02
    matrix, dense = pack_matrix(codes, torch.full((1, 1), scale)), codes.float() * scale
    x, half = torch.randn(tokens, i), dense.bfloat16()
    kernel, rounded = packed_linear_cpu.CompiledLinear(library(), variant), x.bfloat16()
    return {
        "int8": lambda: kernel.packed_linear(x, matrix, "int8"),
        "float": lambda: kernel.packed_linear(x, matrix, "float"),
        TORCH[0]: lambda: F.linear(x, dense),
        TORCH[1]: lambda: F.linear(rounded, half),
    }


def head(o: int, i: int, tokens: int) -> Sides:
    """An output head of 16-bit weights."""
    weight, x = torch.randn(o, i), torch.randn(tokens, i)
    bfloat16, float16, rounded = weight.bfloat16(), weight.half(), x.bfloat16()
    return {
        "bfloat16": lambda: half_linear(x, bfloat16),
        "float16": lambda: half_linear(x, float16),
        TORCH[0]: lambda: F.linear(x, weight),
        TORCH[1]: lambda: F.linear(rounded, bfloat16),
    }


def measure(sides: Sides, repeats: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, dict[str, float]]:
    """Time the sides in turn, after two rounds for warming up: best and median milliseconds, and torch's over ours."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 2):
        for name, run in sides.items():
            start = clock()
            run()
            times[name].append(1e3 * (clock() - start))
    medians = {name: statistics.median(sample[2:]) for name, sample in times.items()}
    ratios = {name: {f"{torchs} / this": medians[torchs] / medians[name] for torchs in TORCH} for name in sides}
    return {name: {"best": min(times[name][2:]), "median": medians[name], **ratios[name]} for name in sides}


def main() -> None:
    """Print a line for each case and side, or all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--repeats", type=int, default=30, help="rounds for each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", choices=packed_linear_cpu.VARIANTS, help="instruction set; the best by default")
    parser.add_argument("--processor-time", action="store_true", help="that of one thread: for a busy machine")
    given = parser.parse_args()
    clock = time.thread_time if given.processor_time else time.perf_counter
    given.threads = 1 if given.processor_time else given.threads
    best = packed_linear_cpu.best_variant()
    variant = packed_linear_cpu.VARIANTS.index(given.variant) if given.variant else best
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    cases = [(f"packed {o} x {i}", tokens, lambda s=(o, i, tokens): packed(*s, variant))
             for o, i in SHAPES for tokens in TOKENS]  # fmt: skip
    cases += [(f"head {o} x {i}", tokens, lambda s=(o, i, tokens): head(*s)) for o, i in HEADS for tokens in TOKENS]
    rows = []
    for name, tokens, make in cases:
        found = measure(make(), given.repeats if tokens < 16 else max(1, given.repeats // 4), clock)
        rows.append({"case": name, "tokens": tokens, "sides": found})
        for side, of in found.items() if not given.json else ():
            ratios = " ".join(f"{of[f'{torchs} / this']:6.2f}x" for torchs in TORCH)
            print(f"{name:<20} T {tokens:>3} {side:<15} {of['best']:9.3f} /{of['median']:9.3f} ms {ratios}", flush=True)
    machine = {"torch": torch.__version__, "threads": given.threads, "variant": packed_linear_cpu.VARIANTS[variant]}
    print(json.dumps({**machine, "rows": rows}, indent=1) if given.json else machine)


if __name__ == "__main__":
    main()
