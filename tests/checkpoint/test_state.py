"""One form on disk for every optimizer and precision: weights and moments pass between them unchanged."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pool import Pools

CONVERT = "tests.checkpoint.cases:convert"
OPTIMIZERS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain float32": (1, {}),
    "plain bfloat16": (1, {"precision": "bfloat16"}),
    "dp2 distributed float32": (2, {"parallel": {"distributed_optimizer": True}}),
    "dp2 distributed bfloat16": (2, {"parallel": {"distributed_optimizer": True}, "precision": "bfloat16"}),
}


def _same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to bfloat16, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.asarray(rounded).view(np.float32)


@pytest.mark.parametrize(("first", "second"), list(permutations(OPTIMIZERS, 2)))
def test_weights_and_moments_pass_unchanged(pools: Pools, tmp_path: Path, first: str, second: str) -> None:
    folders = [tmp_path / name for name in ("first", "second", "again")]
    ranks, changes = OPTIMIZERS[first]
    begun = pools(ranks).run(CONVERT, save_to=str(folders[0]), steps=2, **changes)[0]
    others, other = OPTIMIZERS[second]
    moved = pools(others).run(CONVERT, save_to=str(folders[1]), load_from=str(folders[0]), **other)[0]
    back = pools(ranks).run(CONVERT, save_to=str(folders[2]), load_from=str(folders[1]), **changes)[0]
    _same(moved["state"], begun["state"])
    _same(back["state"], begun["state"])
    assert begun["state"]["0.output_layer.weight/exp_avg_sq/count"].item() == 2
    moments = [value for name, value in begun["state"].items() if name.endswith("/exp_avg_sq")]
    assert len(moments) == len(begun["model"])
    assert all(np.any(value > 0) for value in moments)
    for weight, copy in zip(moved["model"], begun["model"], strict=True):
        if "bfloat16" in first and "bfloat16" not in second:
            np.testing.assert_array_equal(_bfloat16(weight), copy)  # the float32 weight behind the rounded one
        elif "bfloat16" in second and "bfloat16" not in first:
            np.testing.assert_array_equal(weight, _bfloat16(copy))
        else:
            np.testing.assert_array_equal(weight, copy)


def test_training_goes_on_the_same_whichever_optimizer_wrote(pools: Pools, tmp_path: Path) -> None:
    """The step counter matters: Adam's correction of its moments depends on it."""
    pools(2).run(CONVERT, save_to=str(tmp_path / "a"), steps=3, parallel={"distributed_optimizer": True})
    pools(1).run(CONVERT, save_to=str(tmp_path / "b"), load_from=str(tmp_path / "a"))
    (direct,) = pools(1).run(CONVERT, save_to=str(tmp_path / "c"), load_from=str(tmp_path / "a"), steps=2)
    (detour,) = pools(1).run(CONVERT, save_to=str(tmp_path / "d"), load_from=str(tmp_path / "b"), steps=2)
    _same(detour["state"], direct["state"])
    assert direct["state"]["0.output_layer.weight/exp_avg/count"].item() == 5
