"""A forest of runs as JSON for other programs; docs/lineage.md describes every key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megacpt.checkpoint.manifest import incomplete
from megacpt.checkpoint.store import checkpoint_step
from megacpt.continuation.ledger import Ledger
from megacpt.continuation.lineage.forest import Forest, Node, grow_forest
from megacpt.data.plan import Source
from megacpt.errors import CheckpointError

FORMAT = 1


def export(paths: Sequence[Path]) -> dict[str, Any]:
    """Return all runs and checkpoints in and below `paths`, each with the number of what it began on.

    The same forest gives the same text; nothing depends on the time or the machine.

    Raises:
        CheckpointError: if one of `paths` holds no run and no checkpoint.
    """
    forest = grow_forest(paths)
    numbers = {node: number for number, node in enumerate(forest)}
    return {
        "format": FORMAT,
        "nodes": [_node(node, numbers) for node in forest],
        "streams": _streams(forest),
        "problems": list(forest.problems),
    }


def _node(node: Node, numbers: dict[Node, int]) -> dict[str, Any]:
    ledger, missing = node.ledger, node.folder is None
    kind = "missing" if missing else "run" if node.is_run else "checkpoint"
    return {
        "kind": kind,
        "folder": None if missing else str(node.folder),
        "id": None if missing else ledger.id,
        "parent": None if node.parent is None else numbers[node.parent],
        "parent_id": ledger.parent,
        "parent_path": ledger.parent_path,
        "depth": len(ledger.stages),
        "tokens": ledger.tokens,
        "steps_planned": node.steps,
        "derived": ledger.derived,
        "tokenizer": ledger.tokenizer,
        "model": None if missing else ledger.model,
        "stage": asdict(ledger.stage),
        "began_at": None if node.origin is None else {"steps": node.origin.steps, "tokens": node.origin.tokens},
        "checkpoints": [_checkpoint(path) for path in node.checkpoints],
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    try:
        ledger: Ledger | None = Ledger.read(path)
    except CheckpointError:
        ledger = None
    return {
        "path": str(path),
        "step": checkpoint_step(path),
        "id": None if ledger is None else ledger.id,
        "tokens": None if ledger is None else ledger.tokens,
        "problem": incomplete(path),
    }


def _streams(forest: Forest) -> list[dict[str, Any]]:
    """Return every stream that a stage reads: its names and places, and the tokens of each node's own stage."""
    found: dict[str, dict[str, Any]] = {}
    for number, node in enumerate(forest):
        if node.ledger.derived is not None:
            continue  # its stage was trained elsewhere
        for source in node.stage.plan.sources:
            _add(found.setdefault(source.content_hash, _stream(source)), source, number, node)
    return list(found.values())


def _stream(source: Source) -> dict[str, Any]:
    return {"content_hash": source.content_hash, "names": [], "paths": [], "read": []}


def _add(stream: dict[str, Any], source: Source, number: int, node: Node) -> None:
    for key, value in (("names", source.name.removeprefix("replay-")), ("paths", source.path)):
        if value not in stream[key]:
            stream[key].append(value)
    stream["read"].append(
        {
            "node": number,
            "source": source.name,
            "role": source.role,
            "policy": source.policy,
            "tokens": node.stage.consumed.get(source.name, 0),
            "epochs": node.stage.repeats.get(source.name, 0.0),
        }
    )
