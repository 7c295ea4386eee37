"""Streams, and sessions of small runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megacpt.continuation.ledger import Ledger
from tests.pool import Pools
from tests.small import make_streams

Session = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of streams by name."""
    return make_streams(tmp_path_factory.mktemp("streams"))


@pytest.fixture(scope="session")
def session(pools: Pools) -> Session:
    """Return a function that runs one session (see `cases.session`) on some ranks.

    It returns the first rank's result, with the samples of each step in their global order.
    """

    def run(config: dict[str, Any], ranks: int = 1, **arguments: Any) -> dict[str, Any]:
        results = pools(ranks).run("tests.train.cases:session", config=config, **arguments)
        parallel = config.get("parallel", {})
        data = ranks // (parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("context", 1))
        microbatch = config["batch"]["microbatch"]
        # With one model-parallel group, the data-parallel ranks are the first ones of each group.
        by_rank = [result["rows"] for result in results[:: ranks // data]]
        found = dict(results[0])
        found["rows"] = [_in_order(rows, microbatch) for rows in zip(*by_rank, strict=True)]
        return found

    return run


def _in_order(rows: tuple[list[str], ...], microbatch: int) -> list[str]:
    """Put the samples of one step, by data-parallel rank, in their global order."""
    found: list[str] = []
    for start in range(0, len(rows[0]), microbatch):
        for mine in rows:
            found += mine[start : start + microbatch]
    return found


def weights(pools: Pools, checkpoint: str | Path, **changes: Any) -> dict[str, str]:
    """The hashes of the weights and moments in a checkpoint; `changes` are sections of its run that matter for it."""
    sections = {name: changes[name] for name in changes if name in ("model", "optim")}
    (found,) = pools(1).run("tests.checkpoint.cases:load", folder=str(checkpoint), **sections)
    assert isinstance(found, dict)
    return found


def metrics(run: str | Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics."""
    lines = (json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def ledger(result: dict[str, Any]) -> Ledger:
    """The ledger at the end of a session."""
    return Ledger.from_json(result["ledger"])
