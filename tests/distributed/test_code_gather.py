"""Gathering codes of two bits is, to the last bit, gathering the weights: losses, what is saved, and what is logged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megacpt.config import QuantiseConfig
from megacpt.engine import code_gather
from megacpt.model.quantised import Quantiser
from tests.pool import Pools

CASES = "tests.distributed.gather_cases"
SPLIT = {"tensor": 2, "sequence": True}
MOE = {"experts": 4, "top_k": 2, "ffn": 48, "shared_ffn": 32}
SCALES: dict[str, dict[str, Any]] = {
    "tensor": {},
    "shards": {"scope": "shard", "shards": 2},
    "groups": {"scope": "group", "group": 8},
    "bfloat16 scales": {"rule": "clamp", "format": "bfloat16"},
}
# Ranks, layout, scope of scales, and what else of the run.
RUNS: dict[str, tuple[int, dict[str, Any], str, dict[str, Any]]] = {
    "dp2": (2, {}, "tensor", {}),
    "dp2, shards": (2, {}, "shards", {"quantised_cache": "2bit"}),
    "dp2, groups": (2, {}, "groups", {"quantised_cache": "fp8"}),
    "dp2, lion, frozen": (2, {}, "bfloat16 scales", {"optim": {"optimizer": "lion", "freeze": ["layers:2"]}}),
    "dp3": (3, {}, "tensor", {"batch": {"sequences": 6}}),
    "dp4": (4, {}, "tensor", {}),
    "dp1": (1, {}, "tensor", {}),
    "tp2 dp2": (4, SPLIT, "tensor", {}),
    "tp2 dp2, shards": (4, SPLIT, "shards", {"recompute": "full"}),
    "cp2": (2, {"context": 2}, "tensor", {}),
    "pp2 dp2": (4, {"pipeline": 2, "virtual_pipeline": 2}, "tensor", {"model": {"tied_embeddings": True}}),
    "dp4 ep2, experts": (4, {"expert": 2}, "groups", {"model": {"moe": MOE}}),
}
MIXED = ("dp2", "tp2 dp2, shards", "dp4 ep2, experts")  # in bfloat16 too


def _changes(name: str, gather: str, precision: str) -> tuple[int, dict[str, Any]]:
    ranks, layout, scale, more = RUNS[name]
    model = {"quantise": {"grid": "ternary", "scale": SCALES[scale]}, **more.get("model", {})}
    parallel = {**layout, "distributed_optimizer": True, "gather": gather}
    return ranks, {**more, "model": model, "parallel": parallel, "precision": precision}


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "float32") for name in RUNS), *((n, "bfloat16") for n in MIXED)]
)
def test_codes_are_as_good_as_weights(pools: Pools, name: str, precision: str) -> None:
    ranks, changes = _changes(name, "full", precision)
    full = pools(ranks).run(f"{CASES}:train", changes=changes)
    _, changes = _changes(name, "2bit", precision)
    codes = pools(ranks).run(f"{CASES}:train", changes=changes)
    assert codes == full
    flips = [statistics["quantise/flips"] for _, _, statistics in codes[0]["steps"]]
    assert min(flips) > 0


@pytest.mark.parametrize(
    ("name", "precision"), [("dp2", "float32"), ("dp2", "bfloat16"), ("tp2 dp2, shards", "bfloat16")]
)
def test_a_resume_is_exact(pools: Pools, tmp_path: Path, name: str, precision: str) -> None:
    ranks, changes = _changes(name, "2bit", precision)
    pool, saved = pools(ranks), str(tmp_path / "checkpoint")
    whole = pool.run(f"{CASES}:train", changes=changes)
    first = pool.run(f"{CASES}:train", changes=changes, steps=2, save=saved)
    for gather in ("2bit", "full"):
        _, other = _changes(name, gather, precision)
        rest = pool.run(f"{CASES}:train", changes=other, first=2, steps=3, load=saved)
        for all_steps, begun, ended in zip(whole, first, rest, strict=True):
            assert begun["steps"] + ended["steps"] == all_steps["steps"]
            assert {**ended, "steps": 0} == {**all_steps, "steps": 0}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_matrices_cost_an_eighth_of_bfloat16(pools: Pools, precision: str) -> None:
    sizes = {"layers": 2, "hidden": 512, "ffn": 1024, "quantise": {"grid": "ternary"}}
    parallel = {"distributed_optimizer": True, "gather": "2bit"}
    (found, _) = pools(2).run(f"{CASES}:sent", changes={"model": sizes, "parallel": parallel, "precision": precision})
    width = 4 if precision == "float32" else 2
    matrices = found["codes"] - width * (found["all"] - found["ternary"])
    assert found["full"] == 0
    assert 1 / 8 < matrices / (2 * found["ternary"]) < 1.1 / 8
    parallel["gather"] = "full"
    (found, _) = pools(2).run(f"{CASES}:sent", changes={"model": sizes, "parallel": parallel, "precision": precision})
    assert found["codes"] == 0
    assert found["full"] == pytest.approx(width * found["all"], rel=1e-2)


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 70)), min_size=1, max_size=5),
    ranks=st.integers(1, 9),
    between=st.integers(0, 100),
)
def test_every_number_comes_from_one_rank(shapes: list[tuple[int, int, int]], ranks: int, between: int) -> None:
    """Whole rows and the rest cover matrices, and what lies between them, once; the rest has whole what is cut."""
    quantise, at = QuantiseConfig(grid="ternary"), between
    places: dict[int, Quantiser] = {}
    for shape in shapes:
        places[at] = Quantiser(nn.Parameter(torch.empty(shape)), quantise, "dense", 0)
        at += math.prod(shape) + between
    each = -(-at // ranks)
    shares = [code_gather._share(places, rank * each, (rank + 1) * each) for rank in range(ranks)]
    seen = torch.zeros(ranks * each, dtype=torch.int64)
    raw = torch.zeros_like(seen)
    begins = {id(quantiser): begin for begin, quantiser in places.items()}
    for rank, share in enumerate(shares):
        stretches = list(share.rest)
        for quantiser, top, end in share.rows:
            width, begin = quantiser.weight.shape[-1], begins[id(quantiser)]
            stretches.append((begin + top * width, begin + end * width))
        for first, last in stretches:
            assert rank * each <= first < last <= (rank + 1) * each
            seen[first:last] += 1
        for first, last in share.rest:
            raw[first:last] += 1
    assert bool((seen == 1).all())
    for begin, quantiser in places.items():
        *_, width = quantiser.weight.shape
        rows = raw[begin : begin + quantiser.weight.numel()].view(-1, width)
        cut = torch.zeros(len(rows), dtype=torch.int64)
        for _, first, last in code_gather._cut(quantiser, shares):
            cut[first:last] += 1
        assert torch.equal(rows, cut[:, None].expand(rows.shape))
