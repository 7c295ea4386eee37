"""Checkpoints to export, and their exports, made in a rank of a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megacpt.checkpoint.store import checkpoints
from tests.pool import Pools
from tests.small import run_mapping

CASES = "tests.convert.export_cases"
TERNARY: dict[str, Any] = {"grid": "ternary", "scale": {"format": "float16"}}


def trained(pools: Pools, folder: Path, stream: str, steps: int = 2, ranks: int = 1, **changes: Any) -> Path:
    """Train a small run; return its last checkpoint."""
    config = run_mapping(folder, {"english": stream}, steps, **changes)
    run = Path(pools(ranks).run("tests.convert.cases:make_run", config=config)[0])
    return checkpoints(run)[-1]


def export(pools: Pools, operation: str, checkpoint: Path, out: Path, **options: Any) -> None:
    """Write an export that must succeed."""
    found = refused(pools, operation, checkpoint, out, **options)
    assert found is None, found


def refused(pools: Pools, operation: str, checkpoint: Path, out: Path, **options: Any) -> tuple[str, str] | None:
    """Try an export; return kind and text of the error."""
    case, texts = f"{CASES}:export", {"checkpoint": str(checkpoint), "out": str(out)}
    found: tuple[str, str] | None = pools(1).run(case, operation=operation, **texts, **options)[0]
    return found


def ask(pools: Pools, case: str, **arguments: Any) -> Any:
    """Run a case of `export_cases` on one rank."""
    return pools(1).run(f"{CASES}:{case}", **arguments)[0]
