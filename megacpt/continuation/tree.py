"""The tree of runs that descend from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.tree import Tree

from megacpt.checkpoint.store import checkpoints
from megacpt.config import load_run
from megacpt.continuation.boundary import RUN, START, started
from megacpt.continuation.ledger import Ledger
from megacpt.errors import CheckpointError


@dataclass(frozen=True)
class RunNode:
    """A run folder with the ledger of its newest checkpoint, or of its start if it has none.

    Attributes:
        folder: the run folder.
        ledger: what it has seen.
        steps: length of its stage in optimizer steps.
    """

    folder: Path
    ledger: Ledger
    steps: int


def find_runs(paths: Sequence[Path]) -> list[RunNode]:
    """Return the runs in and below `paths`, in the order of their names.

    Raises:
        CheckpointError: if there is none, or a ledger is damaged.
    """
    folders: set[Path] = set()
    for path in paths:
        folders.update(found.parent for found in path.rglob(START))
    if not folders:
        raise CheckpointError(f"no run in {', '.join(map(str, paths))}: a run folder holds {START}")
    nodes = []
    for folder in sorted(folders):
        newest = checkpoints(folder)
        ledger = Ledger.read(newest[-1]) if newest else started(folder)
        assert ledger is not None
        config = load_run((newest[-1] if newest else folder) / RUN)  # a run may have become longer than it began
        nodes.append(RunNode(folder, ledger, config.stage_steps))
    return nodes


def lineage_tree(paths: Sequence[Path]) -> Tree:
    """Draw the runs in and below `paths` as a tree, children under the run that they continue."""
    nodes = find_runs(paths)
    by_folder = {node.folder.resolve(): node for node in nodes}
    children: dict[Path | None, list[RunNode]] = {}
    for node in nodes:
        parent = _parent_folder(node.ledger)
        children.setdefault(parent if parent in by_folder else None, []).append(node)
    root = Tree("[bold]lineage[/bold]")

    def grow(branch: Tree, node: RunNode) -> None:
        here = branch.add(_describe(node))
        for child in children.get(node.folder.resolve(), []):
            grow(here, child)

    for node in children.get(None, []):
        grow(root, node)
    return root


def _parent_folder(ledger: Ledger) -> Path | None:
    """Return the run folder that holds the parent checkpoint (RUN/checkpoints/step-...)."""
    return None if ledger.parent_path is None else Path(ledger.parent_path).parent.parent.resolve()


def _describe(node: RunNode) -> str:
    stage = node.ledger.stage
    streams = ", ".join(
        f"{escape(name)} {tokens:,} tokens ({stage.repeats.get(name, 0):.2f} epochs)"
        for name, tokens in stage.consumed.items()
    )
    rate = "not started" if stage.rate is None else f"rate {stage.rate:.3g}, {stage.phase}"
    return (
        f"[bold]{escape(str(node.folder))}[/bold]  {node.ledger.id}\n"
        f"{escape(stage.name)} ({stage.kind}): {stage.steps:,} of {node.steps:,} steps, {stage.tokens:,} tokens, "
        f"{node.ledger.tokens:,} in all\n"
        f"{streams or 'nothing read yet'}\n"
        f"{stage.schedule['kind']} schedule, {rate}; layouts: {', '.join(stage.layouts) or 'none'}"
    )
