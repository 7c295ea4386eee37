"""Conversions prove themselves: right ones leave a card, wrong ones are caught and leave nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megacpt.convert.verification import Card
from tests.convert.exports import trained
from tests.convert.hf_models import edit, save
from tests.pool import Pools
from tests.small import make_streams

pytest.importorskip("transformers", reason="the package transformers (extra hf) is what conversions are compared with")
CASES = "tests.convert.verification_cases"
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("name", ["llama-plain", "gpt_neox", "mistral", "deepseek_v3"])
@pytest.mark.parametrize(("theirs", "ours"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_right_conversion_leaves_a_card(pools: Pools, tmp_path: Path, name: str, theirs: str, ours: str) -> None:
    """Also where one side keeps its weights in 16 bits: the other's are rounded for the comparison."""
    folder, run = save(name, tmp_path / "hf", STORED[theirs]), tmp_path / "run"
    said = pools(1).run(f"{CASES}:converted", folder=str(folder), out=str(run), dtype=ours)[0]
    assert said is None, said
    card = json.loads((run / "verification.json").read_text())
    assert card["passed"]
    assert card["same_choice"] == 1.0
    assert card["largest_difference"] < 1e-4 < card["largest_logit"]
    assert 0 <= abs(card["divergence"]) < 1e-8
    assert card["compared_with"] == "hf"


@pytest.mark.parametrize("rule", ["swapped", "rotated"])
def test_a_wrong_rule_is_caught_and_leaves_nothing(pools: Pools, tmp_path: Path, rule: str) -> None:
    """All shapes fit: queries and keys swapped, and rows in the order of another rotation."""
    folder, run = save("llama-plain", tmp_path / "hf"), tmp_path / "run"
    said = pools(1).run(f"{CASES}:converted", folder=str(folder), out=str(run), rule=rule)[0]
    assert said is not None
    assert said.startswith("CheckpointError")
    assert "NOT THE SAME FUNCTION" in said
    assert not run.exists()


def test_an_export_is_verified_and_a_changed_one_is_caught(pools: Pools, tmp_path: Path) -> None:
    streams = make_streams(tmp_path / "streams")
    checkpoint = trained(pools, tmp_path / "run", streams["english"])
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"export-{dtype}"
        said = pools(1).run(f"{CASES}:exported", run=str(checkpoint), out=str(out), dtype=dtype)[0]
        assert said is None, said
        assert json.loads((out / "verification.json").read_text())["passed"]
    out = tmp_path / "export-float32"
    edit(out, lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    options = {"run": str(checkpoint), "folder": str(out), "out": str(tmp_path)}
    said = pools(1).run(f"{CASES}:compared", **options)[0]
    assert "NOT THE SAME FUNCTION" in said
    assert not json.loads((tmp_path / "verification.json").read_text())["passed"]
    assert "same choice" in pools(1).run(f"{CASES}:compared", **options, tolerance=10.0)[0]


def test_ternary_exports_are_verified_on_their_grid(pools: Pools, tmp_path: Path) -> None:
    streams = make_streams(tmp_path / "streams")
    checkpoint = trained(pools, tmp_path / "run", streams["english"], model={"quantise": {"grid": "ternary"}})
    out = tmp_path / "export"
    said = pools(1).run(f"{CASES}:exported", run=str(checkpoint), out=str(out), dtype="float32")[0]
    assert said is None, said
    assert (out / "verification.json").is_file()


@pytest.mark.parametrize(("difference", "largest", "passed"), [(9e-5, 0.5, True), (2e-4, 0.5, False), (9e-4, 10, True)])
def test_the_tolerance_grows_with_logits_above_one(difference: float, largest: float, passed: bool) -> None:
    card = Card("a", "b", "5", 256, difference, largest, 0.0, 1.0, 1e-4)
    assert card.passed is passed
    assert ("NOT" in card.line()) is not passed


def test_numbers_that_are_none_never_pass() -> None:
    assert not Card("a", "b", "5", 256, np.inf, 1.0, np.nan, 0.0, 1e-4).passed
