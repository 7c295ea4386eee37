"""Every run and checkpoint in some folders, and which began on which.

A ledger names its parent by id, and an id follows from what was seen. So a parent is found wherever its folder lies
now, and even if the checkpoint itself was deleted long ago: the id of any checkpoint of a run can be made again from
the run's own ledger and the stages that its child remembers. The path that the child wrote down is only a hint, for
choosing between copies. Stages whose runs are in none of the folders are known from the ledgers of their descendants.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from megacpt.checkpoint.manifest import MANIFEST
from megacpt.checkpoint.store import checkpoints
from megacpt.config import Tokens
from megacpt.continuation.boundary import RUN, START
from megacpt.continuation.ledger import LEDGER, Ledger, StageRecord
from megacpt.errors import CheckpointError

# Folders of a run in which no other run is looked for.
_OWN = ("checkpoints", "tensorboard", "logs")


@dataclass(eq=False)
class Node:
    """A run, a checkpoint on its own, or a stage that only later ledgers tell of.

    Attributes:
        ledger: of the newest checkpoint that can be read, or later, as a child remembers it; of the start where there
            is neither. Of a missing stage: its stages as far as a child knows them.
        folder: the run folder or the checkpoint; None if it is missing.
        checkpoints: the run's checkpoints, oldest first.
        steps: length of the stage in optimizer steps, if it is known.
        is_run: the folder is a run, so that any of its checkpoints may be a parent.
        parent: what it began on; None if that is nothing, or not even known from a ledger.
        children: what began on it.
    """

    ledger: Ledger
    folder: Path | None
    checkpoints: tuple[Path, ...] = ()
    steps: int | None = None
    is_run: bool = False
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)

    @property
    def stage(self) -> StageRecord:
        """The stage that was trained there."""
        return self.ledger.stage

    @property
    def origin(self) -> StageRecord | None:
        """The stage of the parent as it was when this one began on it; None for a first stage."""
        own = self.ledger.stages
        return own[-2] if self.ledger.derived is None and len(own) > 1 else None

    def began(self, ledger: Ledger) -> bool:
        """Whether `ledger` began on a checkpoint of this node (its weights may have been made from one)."""
        if self.folder is None or ledger.parent is None:
            return False
        if not self.is_run:
            return self.ledger.id == ledger.parent
        stages = ledger.stages if ledger.derived is not None else ledger.stages[:-1]
        own = self.ledger.stages
        if [stage.name for stage in stages] != [stage.name for stage in own]:
            return False  # spares the work
        same = all(one.content() == other.content() for one, other in zip(own[:-1], stages, strict=False))
        return same and own[-1].is_same(stages[-1]) and replace(self.ledger, stages=stages).id == ledger.parent


@dataclass(frozen=True)
class Forest:
    """The trees of runs, the roots in the order of their folders, and what could not be read."""

    roots: tuple[Node, ...]
    problems: tuple[str, ...]

    def __iter__(self) -> Iterator[Node]:
        """Every node, parents before children."""
        waiting = list(reversed(self.roots))
        while waiting:
            node = waiting.pop()
            yield node
            waiting += reversed(node.children)

    def complain(self) -> None:
        """Raise CheckpointError with what could not be read, if anything."""
        if self.problems:
            raise CheckpointError("not everything could be read:\n  " + "\n  ".join(self.problems))


def grow_forest(paths: Sequence[Path]) -> Forest:
    """Find the runs and checkpoints in and below `paths`, and link each to what it began on.

    What is damaged is left out and named in `Forest.problems`.

    Raises:
        CheckpointError: if one of them holds no run and no checkpoint.
    """
    problems: list[str] = []
    nodes = [node for folder in _places(paths) if (node := _read(folder, problems)) is not None]
    linked = _Linked(nodes)
    for node in sorted(nodes, key=lambda node: node.ledger.derived is not None):
        linked.attach(node)
    return Forest(tuple(linked.roots()), tuple(problems))


def _places(paths: Sequence[Path]) -> list[Path]:
    """Return every run folder, and every checkpoint outside of them, once, in the order of their names."""
    runs: dict[Path, Path] = {}
    alone: dict[Path, Path] = {}
    for path in paths:
        found = list(_walk(path))
        if not found:
            what = "there is no run in" if path.exists() else "there is no folder"
            raise CheckpointError(f"{what} {path}: a run folder holds {START}, and a checkpoint {LEDGER}")
        for folder, is_run in found:
            (runs if is_run else alone).setdefault(folder.resolve(), folder)
    kept = [folder for real, folder in alone.items() if real.parent.parent not in runs]
    return sorted([*runs.values(), *kept])


def _walk(path: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the runs and checkpoints in and below a folder, and whether each is a run; links are followed."""
    walked: set[Path] = set()
    for name, folders, files in os.walk(path, followlinks=True):
        folder, real = Path(name), Path(name).resolve()
        if real in walked:  # a link that leads back
            folders.clear()
            continue
        walked.add(real)
        is_run = START in files
        if is_run or (LEDGER in files and MANIFEST in files):
            yield folder, is_run
        folders[:] = [inner for inner in folders if not (is_run and inner in _OWN) and not inner.startswith(".")]


def _read(folder: Path, problems: list[str]) -> Node | None:
    """Return the node of a run folder or of a checkpoint; None where nothing of it can be read."""
    is_run = (folder / START).is_file()
    found = checkpoints(folder) if is_run else []
    ledgers = [*(path / LEDGER for path in reversed(found)), folder / START] if is_run else [folder / LEDGER]
    for path in ledgers:
        try:
            ledger = Ledger.read_file(path)
            break
        except CheckpointError as error:
            problems.append(str(error))
    else:
        return None
    # A run may have become longer than it began; what its newest checkpoint says holds.
    config = (found[-1] if found else folder) / RUN
    steps = None
    try:
        steps = _planned(config, ledger.stage)
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        problems.append(f"{config} does not say how long the stage is: {type(error).__name__}: {error}")
    return Node(ledger, folder, tuple(found), steps, is_run)


def _planned(config: Path, stage: StageRecord) -> int:
    """Return the length of a stage in steps; of the configuration only that is read, whatever version wrote it."""
    if not stage.batch:  # converted: nothing was trained
        return 0
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is ten times as fast
    content = yaml.load(config.read_bytes(), Loader=loader)
    return -(-Tokens.parse(content["stage"]["tokens"]) // (stage.batch * stage.seq_length))


class _Linked:
    """Nodes by what they hold, and the missing ones between them."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes
        self._held: dict[str, list[Node]] | None = None
        self._missing: dict[str, Node] = {}
        self._by_place: dict[str, list[Node]] = {}
        for node in nodes:
            if node.ledger.derived is None:
                self._by_place.setdefault(_place(node.ledger.stages), []).append(node)

    def attach(self, node: Node) -> None:
        """Link a node to its parent."""
        if node.ledger.parent is None:
            return
        known = [other for other in self._nodes if other is not node and other.began(node.ledger)]
        known = known or [other for other in self._holding(node.ledger.parent) if other is not node]
        if known:
            parent = max(known, key=lambda other: _likely(node, other))
            _link(node, parent)
            if node.origin is not None and node.origin.steps > parent.stage.steps:  # its checkpoints were deleted
                parent.ledger = replace(parent.ledger, stages=node.ledger.stages[:-1])
        elif node.ledger.derived is not None:
            # What went into it may be of several lines, so that no row of missing stages can be made of its own.
            same = _place(node.ledger.stages)
            if same in self._missing:
                _link(node, self._missing[same])
        else:
            _link(node, self._stand_in(node.ledger, node.ledger.stages[:-1], node))

    def roots(self) -> list[Node]:
        """Return the nodes without a parent, after putting all children in order."""
        everyone = [*self._nodes, *self._missing.values()]
        for node in everyone:
            node.children.sort(key=lambda child: (child.origin.steps if child.origin else 0, str(child.folder or "")))
        return sorted((node for node in everyone if node.parent is None), key=_first_folder)

    def _holding(self, identity: str) -> list[Node]:
        """Return the runs that have a checkpoint of this id on disk; weights made of several need a look at all."""
        if self._held is None:
            self._held = {}
            for node in self._nodes:
                for checkpoint in node.checkpoints:
                    try:
                        self._held.setdefault(Ledger.read(checkpoint).id, []).append(node)
                    except CheckpointError:  # told already if it mattered
                        continue
        return self._held.get(identity, [])

    def _stand_in(self, ledger: Ledger, stages: tuple[StageRecord, ...], child: Node) -> Node:
        """Return a node for a run that is in none of the folders, linked to the nearest ancestor that is."""
        place = _place(stages)
        if place in self._missing:
            return self._missing[place]
        made = Node(Ledger(None, None, ledger.tokenizer, ledger.model, stages), None)
        self._missing[place] = made
        # The id of a missing checkpoint may not be that of the run of the same stages: weights made from it.
        same, before = self._by_place.get(place, []), stages[:-1]
        older = same or (self._by_place.get(_place(before), []) if before else [])
        if older:
            _link(made, max(older, key=lambda other: _likely(child, other)))
        elif before:
            _link(made, self._stand_in(ledger, before, child))
        return made


def _link(node: Node, parent: Node) -> None:
    node.parent = parent
    parent.children.append(node)


def _likely(node: Node, candidate: Node) -> tuple[bool, bool, int]:
    """Order copies of a parent: the one where the ledger says, one that holds the checkpoint, the nearest on disk."""
    place, here = _real(candidate), _real(node)
    hint = node.ledger.parent_path
    told = False if hint is None else place in (Path(hint).resolve(), Path(hint).parent.parent.resolve())
    step = node.origin.steps if node.origin is not None else node.stage.steps
    holds = not candidate.is_run or any(path.name == f"step-{step:08d}" for path in candidate.checkpoints)
    return told, holds, len(Path(os.path.commonpath([place, here])).parts)


def _real(node: Node) -> Path:
    return Path() if node.folder is None else node.folder.resolve()


def _place(stages: Sequence[StageRecord]) -> str:
    """Return what is the same for every checkpoint of a run: all of the stages before, and which stage it is."""
    content = [*(stage.content() for stage in stages[:-1]), stages[-1].identity()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _first_folder(node: Node) -> str:
    """The name by which a root is put in order: its own folder, or the first of its descendants' that is there."""
    while node.folder is None and node.children:
        node = node.children[0]
    return str(node.folder)
