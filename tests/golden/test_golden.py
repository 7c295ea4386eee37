"""Golden runs: losses and gradient norms of ten steps, as they were when last looked at.

A change that should not alter numbers leaves them alone; one that should writes them anew, and says so:

    python -m tests.golden.test_golden
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pools

GOLDEN = Path(__file__).with_name("losses.json")
CASES: dict[str, dict[str, Any]] = {
    "llama-like": {},
    "neox-like": {"model": {"activation": "gelu", "bias": True, "rope": {"share": 0.25}, "kv_heads": 4}},
    "qwen-like": {"model": {"qkv_bias": True, "qk_norm": True, "tied_embeddings": True}},
    # Small rates: a weight that rounds to the other level because a sum had another order would change the numbers.
    "trilm": {
        "model": {"quantise": {"grid": "ternary", "scale": {"scope": "shard", "shards": 2}}},
        "optim": {"peak_lr": 1e-3},
    },
    "trilm, experts": {
        "model": {"moe": {"experts": 8, "top_k": 2, "ffn": 48}, "quantise": {"grid": "ternary"}},
        "optim": {"peak_lr": 1e-3},
    },
    "switch, penalty": {"model": {"moe": {"experts": 8}}},
    "granular, sinkhorn": {
        "model": {"moe": {"experts": 31, "top_k": 3, "ffn": 24, "shared_ffn": 24, "balance": {"kind": "sinkhorn"}}}
    },
    "deepseek-like": {
        "model": {
            "moe": {
                "experts": 16,
                "top_k": 4,
                "ffn": 24,
                "shared_ffn": 24,
                "first_dense": 1,
                "score": "sigmoid",
                "renormalise": True,
                "scale": 2.5,
                "groups": 4,
                "groups_kept": 2,
                "balance": {"kind": "bias"},
            }
        }
    },
}


def run(pools: Pools, name: str) -> dict[str, list[float]]:
    """Ten steps of one process."""
    (result,) = pools(1).run("tests.distributed.cases:train", changes=CASES[name], steps=10)
    return {"losses": result["losses"], "norms": result["norms"]}


@pytest.mark.parametrize("name", CASES)
def test_golden(pools: Pools, name: str) -> None:
    expected = json.loads(GOLDEN.read_text())[name]
    found = run(pools, name)
    # Processors of different kinds sum in different orders; ten steps carry that to some 1e-6.
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)


if __name__ == "__main__":
    ranks = Pools()
    GOLDEN.write_text(json.dumps({name: run(ranks, name) for name in CASES}, indent=1) + "\n")
    ranks.close()
    sys.stderr.write(f"wrote {GOLDEN}\n")
