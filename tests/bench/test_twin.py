from __future__ import annotations

from pathlib import Path

import pytest

from megacpt.bench.result import Interval, read_result
from megacpt.bench.twin import twin_config
from megacpt.errors import ConfigError
from tests.cli.command import megacpt

SMALL = (
    "model={layers: 2, hidden: 32, ffn: 48, heads: 2, moe: {experts: 4, top_k: 2, ffn: 16, shared_ffn: 16}}",
    "batch={sequences: 2, seq_length: 16, microbatch: 1}",
)


def test_a_dense_model_has_no_twin() -> None:
    with pytest.raises(ConfigError, match=r"model\.moe: tiny has no experts"):
        twin_config(None, "tiny")


def test_the_command_measures_both_on_the_same_tokens(tmp_path: Path) -> None:
    done = megacpt("bench", "twin", *SMALL, "--blocks", "2", "--json", "twin.json", folder=tmp_path)
    assert done.status == 0, done.err
    assert "experts / dense twin: " in done.out
    result = read_result(tmp_path / "twin.json")
    sides = [result.series[name] for name in ("experts", "dense twin")]
    assert [len(side.blocks) for side in sides] == [2, 2]
    assert {side.work for side in sides} == {32.0}
    found = result.figures["experts / dense twin"]
    assert isinstance(found, Interval)
    assert found.low <= found.value <= found.high
    # Six matrices of 32 * 16 more in each layer than the twin, and the routers.
    assert result.figures["parameters"] == result.figures["parameters of the twin"] + 2 * (6 * 32 * 16 + 32 * 4)
