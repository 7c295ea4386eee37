"""Times the router, Sinkhorn's algorithm and the way to the experts and back, beside Megatron Core's functions.

Run as ``python kernels/bench_router.py``. The candidates take turns in one process, so that a busy moment of the
machine hits both; printed are the best and the median time in milliseconds, and how often ours fits into Megatron's,
by each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

import megacpt.runtime  # noqa: F401  prepares megatron.core for import

from megatron.core.transformer.moe import moe_utils  # isort: skip

from megacpt.ops import balance
from megacpt.ops.expert_order import combine_tokens, gather_tokens, moe_sort
from megacpt.ops.router import Scoring, choose_experts, gated
from megacpt.ops.sinkhorn import sinkhorn

Pair = tuple[Callable[[], object], Callable[[], object]]  # Megatron's and ours
ALPHA, BETA = 0.01, 0.001


def router(tokens: int, experts: int, chosen: int) -> Pair:
    """Gates, counts, balance loss and z-loss with their values, forward and backward."""
    logits, up, one = torch.randn(tokens, experts), torch.randn(tokens, experts), torch.ones(())
    scoring = Scoring(chosen)

    def theirs() -> object:
        leaf = logits.detach().requires_grad_()
        gates, routing_map = moe_utils.topk_routing_with_score_function(leaf, chosen)
        counts = routing_map.sum(0)
        aux = moe_utils.switch_load_balancing_loss_func(leaf.softmax(1), counts, tokens, chosen, experts, ALPHA)
        z = moe_utils.z_loss_func(leaf, BETA)
        return torch.autograd.grad((gates, aux, z), leaf, (up, one, one))

    def ours() -> object:
        leaf = logits.detach().requires_grad_()
        routing = choose_experts(leaf, scoring)
        fractions = balance.assignments(routing.counts)
        coefficients = balance.balance_coefficients(fractions, ALPHA) / tokens, torch.full((1,), BETA / tokens)
        gates = gated(leaf, routing, *coefficients, scoring)
        aux = balance.balance_loss(fractions, routing.prob_sum, tokens, ALPHA)
        z = balance.z_loss(routing.z_sum, tokens, BETA)
        return aux, z, torch.autograd.grad(gates, leaf, up[:, :chosen])

    return theirs, ours


def balanced(tokens: int, experts: int, tolerance: float) -> Pair:
    """Sinkhorn's algorithm on logits that are nearly balanced, where Megatron's needs two or three iterations."""
    logits = torch.randn(tokens, experts) * 0.3
    return lambda: moe_utils.sinkhorn(logits), lambda: sinkhorn(logits, tolerance=tolerance)


def there_and_back(tokens: int, experts: int, chosen: int, hidden: int) -> Pair:
    """Sort by expert, gather and combine, forward and backward, with nothing in between."""
    choice = torch.randn(tokens, experts).topk(chosen).indices
    values, weights, up = torch.randn(tokens, hidden), torch.rand(tokens, chosen), torch.randn(tokens, hidden)
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, choice, True)
    dense = torch.zeros(tokens, experts).scatter(1, choice, weights)
    ids = choice.int()

    def theirs() -> object:
        leaves = values.detach().requires_grad_(), dense.detach().requires_grad_()
        rows, _, order = moe_utils.permute(leaves[0], routing_map)
        out = moe_utils.unpermute(rows, order, values.shape, probs=leaves[1], routing_map=routing_map)
        return torch.autograd.grad(out, leaves, up)

    def ours() -> object:
        leaves = values.detach().requires_grad_(), weights.detach().requires_grad_()
        order = moe_sort(ids, experts)
        out = combine_tokens(gather_tokens(leaves[0], order), order, leaves[1])
        return torch.autograd.grad(out, leaves, up)

    return theirs, ours


CASES: dict[str, Callable[[], Pair]] = {
    "router, T 8192, E 64, k 6": lambda: router(8192, 64, 6),
    "router, T 8192, E 256, k 8": lambda: router(8192, 256, 8),
    "Sinkhorn, T 4096, E 64": lambda: balanced(4096, 64, 1e-2),
    "Sinkhorn, T 8192, E 64": lambda: balanced(8192, 64, 1e-2),
    "Sinkhorn to 1e-4, T 8192, E 64": lambda: balanced(8192, 64, 1e-4),
    "order, T 4096, E 64, k 6, H 512": lambda: there_and_back(4096, 64, 6, 512),
}


def measure(pair: Pair, repeats: int) -> dict[str, float]:
    """Time both in turn, after two rounds for warming up: best and median milliseconds, and their ratios."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 2):
        for run, into in zip(pair, times, strict=True):
            start = time.perf_counter()
            run()
            into.append(1e3 * (time.perf_counter() - start))
    theirs, ours = (sample[2:] for sample in times)
    found = {"megatron_best": min(theirs), "megatron_median": statistics.median(theirs)}
    found |= {"ours_best": min(ours), "ours_median": statistics.median(ours)}
    return found | {f"ratio_{by}": found[f"megatron_{by}"] / found[f"ours_{by}"] for by in ("best", "median")}


def main() -> None:
    """Print a line for each case and number of threads, or all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--repeats", type=int, default=30, help="rounds for each case")
    given = parser.parse_args()
    rows = []
    if not given.json:
        print(f"{'milliseconds, best / median':<34} threads {'Megatron':>17} {'megacpt':>17} {'ratio':>13}")
    for name, make in CASES.items():
        for threads in (1, 2):
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            rows.append({"case": name, "threads": threads, **measure(make(), given.repeats)})
            if not given.json:
                cells = ("{megatron_best:8.3f} /{megatron_median:8.3f} {ours_best:8.3f} /{ours_median:8.3f} "
                         "{ratio_best:5.1f} /{ratio_median:6.1f}").format(**rows[-1])  # fmt: skip
                print(f"{name:<34} {threads:>7} {cells}", flush=True)
    if given.json:
        print(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
