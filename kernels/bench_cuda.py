"""Measures the CUDA kernels and writes kernels/BENCH.md; `kernels/gpu_check.sh` runs it.

Times are medians of replayed CUDA graphs over inputs that take turns, more of them than the L2 cache holds. Megatron
Core's own functions are replayed likewise, where they can be (its Sinkhorn asks the device after each iteration).
Without a GPU, ``--unmeasured`` writes the table with targets and floors alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bench_cuda_ternary as ternary
import torch
from torch import Tensor

BUDGETS = Path(__file__).with_name("cuda") / "budgets.json"
BANDWIDTH = 4.3e12  # bytes a second that a copy reaches on an H200
LAUNCH = 2.5e-6  # seconds that one launch takes in a graph
NONE = "not yet measured"
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A line of the table.

    Attributes:
        op: which one.
        shape: tokens, experts and experts a token.
        target: microseconds on an H200.
        bytes_a_logit: what must be moved for each logit, in bytes.
        bytes_a_slot: and for each of the k choices of a token.
    """

    op: str
    shape: tuple[int, int, int]
    target: float | None
    bytes_a_logit: float
    bytes_a_slot: float

    @property
    def floor(self) -> float:
        """Microseconds that moving the bytes or launching takes, whichever is longer."""
        tokens, experts, top_k = self.shape
        moved = tokens * (experts * self.bytes_a_logit + top_k * self.bytes_a_slot + 4)
        return 1e6 * max(LAUNCH, moved / BANDWIDTH)


SHAPES = ((8192, 8, 1), (8192, 31, 3), (8192, 64, 6), (16384, 128, 8), (8192, 256, 8), (262144, 256, 8))
FORWARD = {(8192, 8, 1): 4, (8192, 31, 3): 4, (16384, 128, 8): 8, (8192, 256, 8): 8, (262144, 256, 8): 130}
CASES = (
    *(Case("router forward", shape, FORWARD.get(shape), 2, 8) for shape in SHAPES),
    *(Case("router backward", shape, 95 if shape[0] > 10**5 else None, 4, 8) for shape in SHAPES),
    Case("sinkhorn to 1e-2", (8192, 64, 1), 20, 2, 0),
    Case("moe_sort", (8192, 256, 8), 8, 0, 12),
)


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description="measures the CUDA kernels")
    parser.add_argument("--unmeasured", action="store_true", help="only floors and targets")
    parser.add_argument("--sanitizer", default="not run", help="what compute-sanitizer found")
    parser.add_argument("--write", type=Path, help="the file to write")
    arguments = parser.parse_args()
    if not (arguments.unmeasured or torch.cuda.is_available()):
        parser.error("there is no GPU that this torch can use; --unmeasured writes floors and targets alone")
    none = (None, None)
    lines = [line(case, *(none if arguments.unmeasured else measure(case))) for case in CASES]
    others = [
        ternary.line(case, *(none if arguments.unmeasured else ternary.measure(case, replayed)))
        for case in ternary.CASES
    ]
    text = page(lines, others, arguments.unmeasured, arguments.sanitizer)
    print(text)
    if arguments.write:
        arguments.write.write_text(text)


def line(case: Case, ours: float | None, theirs: float | None) -> str:
    """A row of the table."""
    tokens, experts, top_k = case.shape
    columns = [case.op, f"{tokens}, {experts}, {top_k}", f"{case.floor:.1f}", f"{case.target or '-'}"]
    columns += [NONE if ours is None else f"{ours:.1f}", "-" if ours is None else f"{ours / case.floor:.1f}"]
    columns += ["-" if theirs is None else f"{theirs:.1f}"]
    columns += ["-" if ours is None or theirs is None else f"{theirs / ours:.1f}"]
    return "| " + " | ".join(columns) + " |"


def page(lines: list[str], ternary_lines: list[str], unmeasured: bool, sanitizer: str) -> str:
    """All of BENCH.md."""
    where = "no GPU" if unmeasured else torch.cuda.get_device_name()
    table = json.loads(BUDGETS.read_text())
    names = sorted(table["sm_90"])
    static, static_ternary = (
        [f"| {name} | {' | '.join(str(table[arch][name]) for arch in sorted(table))} |" for name in chosen]
        for chosen in (
            [name for name in names if name.startswith("route") and ("bfloat16" in name or "float32" in name)],
            [name for name in names if not name.startswith("route")],
        )
    )
    head = [f"| kernel | {' | '.join(sorted(table))} |", f"| --- |{' --- |' * len(table)}"]
    return "\n".join(
        [
            "# CUDA kernels: measured and static figures",
            "",
            f"{datetime.date.today().isoformat()}, {where}, torch {torch.__version__}; compute-sanitizer: {sanitizer}.",
            "`kernels/gpu_check.sh` writes this page anew on a machine with a GPU.",
            "",
            "bfloat16 logits; times in microseconds. The floor is one launch (2.5 us) or the bytes that must be moved",
            "at 4.3 TB/s, whichever is longer; the target is for an H200. The anchor is Megatron Core's own code for",
            "the same (for `moe_sort`, torch's stable sort).",
            "",
            "| op | T, E, k | floor | target | measured | / floor | anchor | ratio |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
            *ternary.section(ternary_lines),
            "## Static: instructions a row",
            "",
            "Not measured, but counted in the machine code by `kernels/tools/check_sass.py`: warp-instructions a row,",
            "as if all branches were taken (softmax and sigmoid, aligned and not) and eight experts were chosen. What",
            "runs is less. None uses local memory. `16x16`: 16 lanes a row, 16 numbers each (E to 256).",
            "",
            *head,
            *static,
            "",
            "## Static: instructions a weight",
            "",
            "Likewise, of ternary matrices: a thread's instructions in the loop over weights. At 4.3 TB/s an H200",
            "has 1.7 for each weight of 2 bits. `8x256`: up to 8 tokens by 256 rows a block; `grouped`: a scale for",
            "each group of columns.",
            "",
            *head,
            *static_ternary,
            "",
        ]
    )


def replayed(runs: list[Run]) -> float:
    """The median time of one run in microseconds, from graphs of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in runs:
            run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for run in runs:
                run()
        return timed(graph.replay) / len(runs)


def timed(run: Run, rounds: int = 20) -> float:
    """The median time of a run in microseconds."""
    times = []
    for _ in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times[3:])


def measure(case: Case) -> tuple[float, float | None]:
    """Our time and Megatron's, in microseconds."""
    tokens, experts, _ = case.shape
    generator = torch.Generator("cuda").manual_seed(0)
    buffers = max(2, min(64, int(150e6 / (2 * tokens * experts))))  # together more than the L2 cache
    logits = [(torch.randn(tokens, experts, generator=generator, device="cuda") * 2).bfloat16() for _ in range(buffers)]
    measured = {"sinkhorn to 1e-2": sinkhorn, "moe_sort": sort}.get(case.op)
    return measured(case, logits) if measured else router(case, logits)


def router(case: Case, logits: list[Tensor]) -> tuple[float, float | None]:
    """The router beside Megatron's functions with both losses; for the backward pass, the difference of both passes."""
    import megacpt.runtime  # noqa: F401  prepares megatron.core for import
    from megacpt.ops import router_cuda
    from megacpt.ops.router_reference import Scoring

    from megatron.core.transformer.moe import moe_utils  # isort: skip

    tokens, experts, top_k = case.shape
    kernels, scoring = router_cuda.load(), Scoring(top_k)
    c, z, up = (torch.ones(size, device="cuda") for size in ((experts,), (1,), (tokens, top_k)))
    routed = [kernels.route(x, None, None, scoring) for x in logits]
    leaves, dense = [x.detach().requires_grad_() for x in logits], torch.ones(tokens, experts, device="cuda").bfloat16()

    def megatron(x: Tensor) -> Tensor:
        gates, chosen = moe_utils.topk_routing_with_score_function(x, top_k)
        shares = torch.softmax(x, dim=-1, dtype=torch.float32)
        aux = moe_utils.switch_load_balancing_loss_func(shares, chosen.sum(0), tokens, top_k, experts, 0.01)
        return (gates * dense).sum() + aux + moe_utils.z_loss_func(x, 0.001)

    def both(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(megatron(x), x)

    def ours(x: Tensor, at: tuple[Tensor, ...]) -> Tensor:
        return kernels.gradient(x, at[2], at[1], up, c, z, scoring)

    with torch.no_grad():
        theirs = replayed([lambda x=x: megatron(x) for x in logits])
    if case.op == "router forward":
        return replayed([lambda x=x: kernels.route(x, None, None, scoring) for x in logits]), theirs
    total = replayed([lambda x=x: both(x) for x in leaves])
    return replayed([lambda x=x, at=at: ours(x, at) for x, at in zip(logits, routed, strict=True)]), total - theirs


def sinkhorn(case: Case, logits: list[Tensor]) -> tuple[float, float | None]:
    """Our loop with the wait for its result, beside Megatron's on the same balanced logits."""
    import megacpt.runtime  # noqa: F401  prepares megatron.core for import
    from megacpt.ops import router_cuda

    from megatron.core.transformer.moe import moe_utils  # isort: skip

    kernels, start = router_cuda.load(), torch.zeros(case.shape[1], dtype=torch.float64, device="cuda")
    ours = timed(lambda: kernels.sinkhorn(logits[0], start, None, 1e-2, 8))
    return ours, timed(lambda: moe_utils.sinkhorn(logits[0].float(), 1e-2))


def sort(case: Case, logits: list[Tensor]) -> tuple[float, float | None]:
    """The sort beside torch's stable one."""
    from megacpt.ops import expert_order_cuda

    order = expert_order_cuda.load()
    experts = [x.topk(case.shape[2]).indices.int() for x in logits]
    theirs = replayed([lambda e=e: e.flatten().sort(stable=True) for e in experts])
    return replayed([lambda e=e: order.sort(e, case.shape[1]) for e in experts]), theirs


if __name__ == "__main__":
    main()
