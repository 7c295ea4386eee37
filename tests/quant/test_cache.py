"""Forms in which a quantised matrix is kept: all give the same matrix and count the same flips."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megacpt.config import QuantiseConfig
from megacpt.ops.ternarise import ternarise
from megacpt.ops.ternarise_reference import packed_codes, signs
from megacpt.quant.cache import Cache
from megacpt.quant.grids import make_grid
from megacpt.quant.matrix import quantise_matrix
from megacpt.quant.scales import Blocks
from tests.ops.ternary import same_bits

GRIDS: dict[str, dict[str, Any]] = {
    "ternary": {"grid": "ternary", "scale": {"scope": "shard", "shards": 2}},
    "binary": {"grid": "binary"},
    "int": {"grid": "int", "bits": 4, "scale": {"scope": "group", "group": 4}},
    "quest": {"grid": "quest", "bits": 4, "scale": {"scope": "group", "group": 8}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS)
def test_all_forms_give_the_same(grid: str, dtype: torch.dtype) -> None:
    config = QuantiseConfig.model_validate(GRIDS[grid])
    blocks = Blocks.of((8, 24), config.scale, 0, 2)
    draw = torch.Generator().manual_seed(7)
    first, second = (quantise_matrix(torch.randn(8, 24, generator=draw), config, 0, 2) for _ in range(2))
    for form in ("dense", "fp8", "2bit"):
        if config.cache_problem(form) is not None:
            continue
        cache = Cache(form, dtype, blocks, make_grid(config).transform)
        flips = []
        for matrix in (first, second, second):
            scales = matrix.scales[: blocks.rows]  # halves share them
            flips.append(int(cache.put(matrix.codes, scales)))
            assert torch.equal(cache.codes(), matrix.codes)
            assert torch.equal(cache.matrix(), matrix.dense(dtype))
        assert flips == [0, int((first.codes != second.codes).sum()), 0]
        assert (cache.matrix().data_ptr() == cache.matrix().data_ptr()) == cache.lasting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["dense", "fp8", "2bit"])
@pytest.mark.parametrize("width", [24, 30])
def test_packed_codes_give_what_the_op_writes(form: Any, dtype: torch.dtype, width: int) -> None:
    blocks = Blocks(2, 3, 2)
    scales = torch.rand(2, 3, generator=torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(2)
    values = torch.zeros(8, width, dtype=dtype)
    cache = Cache(form, dtype, blocks, 1)
    if form == "dense":  # as it is filled before packed codes come in
        ternarise([torch.randn(8, width, generator=draw).to(dtype)], [scales], [cache.memory(values)], [2])
        values.copy_(cache.matrix())
    for turn in range(3):
        packed = torch.empty(8, -(-width // 4), dtype=torch.uint8)
        weight = torch.randn(8, width, generator=draw).to(dtype)
        ((_, flips),) = ternarise([weight], [scales], [values], [2], [packed]).tolist()
        found = cache.put_packed(packed, scales, width)
        assert found == (0 if turn == 0 and form != "dense" else flips)
        assert torch.equal(cache.matrix(), values)
        assert torch.equal(cache.codes(), signs(values))
    scales[0, 0] = math.inf
    ternarise([weight], [scales], [values], [2])
    cache.put_packed(packed_codes(signs(values)), scales, width)
    assert same_bits(cache.matrix(), values)
    assert values.isnan().any()


@pytest.mark.parametrize(
    ("grid", "bits", "form", "fits"),
    [
        ("ternary", None, "2bit", True),
        ("int", 2, "2bit", True),
        ("int", 3, "2bit", False),
        ("int", 5, "fp8", True),
        ("int", 6, "fp8", False),
        ("quest", 4, "fp8", True),
        ("quest", 5, "fp8", False),
    ],
)
def test_forms_hold_the_codes_they_are_allowed(grid: str, bits: int | None, form: Any, fits: bool) -> None:
    scale = {"scope": "group", "group": 8} if grid == "quest" else {}
    config = QuantiseConfig.model_validate({"grid": grid, "bits": bits, "scale": scale})
    assert (config.cache_problem(form) is None) == fits
    codes = torch.arange(-config.largest_code, config.largest_code + 1, dtype=torch.int8)[None]
    if form == "fp8":
        cache = Cache("fp8", torch.float32, Blocks(1, 1), 1)
        cache.put(codes, torch.ones(1, 1))
        assert torch.equal(cache.codes(), codes) == fits
        assert torch.equal(codes.to(torch.float8_e4m3fn).to(torch.int8), codes) == fits
