"""The checkpoints of a run: each written beside the others, verified, and only then given its name."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megacpt.checkpoint.manifest import MANIFEST, Described, damage, incomplete, make_manifest
from megacpt.checkpoint.tensors import check_index, explained, load_tensors, save_tensors, without_what_lacks
from megacpt.data.files import sync
from megacpt.errors import CheckpointError
from megacpt.runtime.layout import is_first_rank

log = logging.getLogger(__name__)
NAME = re.compile(r"step-(\d{8,})$")


def checkpoint_step(folder: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    match = NAME.match(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is not named like a checkpoint (step-00001234)")
    return int(match.group(1))


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first; unfinished ones do not count."""
    folder = run / "checkpoints"
    found = [p for p in folder.iterdir() if NAME.match(p.name)] if folder.is_dir() else []
    return sorted(found, key=checkpoint_step)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that `path` means: itself, or the newest of a run folder in which no file is missing.

    Contents are verified when it is loaded.

    Raises:
        CheckpointError: if there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    if NAME.match(path.name) and path.is_dir():
        raise CheckpointError(str(incomplete(path)))
    found = checkpoints(path)
    for folder in reversed(found):
        wrong = incomplete(folder)
        if wrong is None:
            return folder
        log.warning("damaged checkpoint passed over: %s", wrong)
    if found:
        raise CheckpointError(f"every checkpoint of {path} is damaged (the newest: {incomplete(found[-1])})")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run folder or one of its checkpoints")
    raise CheckpointError(f"{path} holds no checkpoint: give a run folder (with checkpoints/step-...) or one of those")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
        last: how many of the newest; None for all.
        every: keep for good those whose step is a multiple of this.
        best: how many of those with the lowest score.
    """

    last: int | None = 2
    every: int | None = None
    best: int | None = None

    def superfluous(self, steps: list[int], scores: Mapping[int, float]) -> list[int]:
        """Return the steps whose checkpoints may go; `scores` are evaluation losses, lower is better."""
        if self.last is None:
            return []
        keep = set(sorted(steps)[-self.last :])
        if self.every:
            keep |= {step for step in steps if step % self.every == 0}
        if self.best:
            scored = sorted((s for s in steps if s in scores), key=lambda s: (scores[s], s))
            keep |= set(scored[: self.best])
        return [step for step in steps if step not in keep]


class Store:
    """Writes and finds the checkpoints of one run; every rank has one and makes the same calls.

    Args:
        run: the run folder.
        retention: which checkpoints stay after a new one is complete.
    """

    def __init__(self, run: Path, retention: Retention | None = None) -> None:
        self.folder = run / "checkpoints"
        self.run = run
        self.retention = retention or Retention()
        self.queue = AsyncCallsQueue()
        self.scores: dict[int, float] = {}

    def path(self, step: int) -> Path:
        """Return where the checkpoint of `step` is or will be."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: dict[str, Any], files: Mapping[str, str], asynchronous: bool = False) -> Path:
        """Write a checkpoint; with `asynchronous`, return while it is still being written.

        A checkpoint appears under its name once every file has been written, flushed and read back.

        Args:
            step: the step it belongs to.
            state: an engine's state.
            files: further files by name (ledger, configuration), as text.
            asynchronous: write in the background; call `poll` at every step.

        Raises:
            CheckpointError: if the disk is full or fails; earlier checkpoints are untouched.
        """
        self.poll(wait=True)
        partial_folder = self.folder / f".step-{step:08d}.partial"
        _on_first_rank(partial_folder, partial(self._make_room, partial_folder))
        request = save_tensors(state, partial_folder, asynchronous)
        finish = partial(self._finish, step, partial_folder, dict(files))
        if request is None:
            finish()
        else:
            request.add_finalize_fn(finish)
            self.queue.schedule_async_request(request)
        return self.path(step)

    def publish(
        self, step: int, write: Callable[[Path], Mapping[str, Described]], files: Mapping[str, str], go_on: bool = False
    ) -> Path:
        """Write a checkpoint whose tensors `write` puts into the folder that it is given; every rank calls this.

        Args:
            step: as for `save`.
            write: runs on every rank; when it returns, this rank's part is written, and it returns size and hash of
                the files that it has read back.
            files: as for `save`.
            go_on: give `write` what an interrupted call has left.

        Raises:
            CheckpointError: as `save`, or as `write` does.
        """
        self.poll(wait=True)
        partial_folder = self.folder / f".step-{step:08d}.partial"
        _on_first_rank(partial_folder, partial(self._make_room, partial_folder, go_on))
        self._finish(step, partial_folder, dict(files), write(partial_folder))
        return self.path(step)

    def poll(self, wait: bool = False) -> None:
        """Complete background checkpoints that have been written; with `wait`, all of them."""
        if self.queue.get_num_unfinalized_calls():
            with explained(self.folder):
                self.queue.maybe_finalize_async_calls(blocking=wait)

    def _make_room(self, partial_folder: Path, go_on: bool = False) -> None:
        """Make an empty folder, and remove what crashes left, at this step (unless it is to go on) or another."""
        for left in self.folder.glob(".step-*.partial"):
            if left != partial_folder or not go_on:
                shutil.rmtree(left, ignore_errors=True)
        partial_folder.mkdir(parents=True, exist_ok=go_on)

    def _finish(
        self, step: int, partial_folder: Path, files: dict[str, str], known: Mapping[str, Described] | None = None
    ) -> None:
        """Add the small files and the manifest, flush, rename, and let superfluous checkpoints go."""
        _on_first_rank(partial_folder, partial(_write_texts, partial_folder, files))
        with explained(partial_folder):
            manifest = make_manifest(partial_folder, known)
        _on_first_rank(partial_folder, partial(self._publish, step, partial_folder, manifest))

    def _publish(self, step: int, partial_folder: Path, manifest: dict[str, Any]) -> None:
        """Check the index, write the manifest, flush everything, give the checkpoint its name, and retire others."""
        check_index(partial_folder)
        _write_texts(partial_folder, {MANIFEST: json.dumps(manifest, indent=1)})
        for path in (*partial_folder.iterdir(), partial_folder):  # Megatron's writers flush only some of them
            sync(path)
        final = self.path(step)
        if final.exists():  # the same step again, after a resume from an earlier one
            shutil.rmtree(final)
        partial_folder.replace(final)
        sync(self.folder)
        self._retire(step)

    def _retire(self, newest: int) -> None:
        """Remove the checkpoints that the retention rule lets go; their manifest first, so none is left half.

        Those beyond `newest`, which has just been written, are damaged ones that the run resumed behind. They must not
        take the places of good ones.
        """
        steps = [step for step in map(checkpoint_step, checkpoints(self.run)) if step <= newest]
        for step in self.retention.superfluous(steps, self.scores):
            (self.path(step) / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.path(step), ignore_errors=True)

    def newest_good(self) -> Path | None:
        """Return the newest undamaged checkpoint, or None if there is none at all.

        Raises:
            CheckpointError: if there are checkpoints, and every one is damaged.
        """
        found = checkpoints(self.run)
        for folder in reversed(found):
            wrong = damage(folder)
            if wrong is None:
                return folder
            if is_first_rank():
                log.warning("damaged checkpoint passed over: %s", wrong)
        if found:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged (the newest: {damage(found[-1])}); "
                "restore one from a backup, or start the run in a new folder"
            )
        return None


def load_checkpoint(folder: Path, engine: Any, verified: bool = False, boundary: bool = False) -> None:
    """Verify a checkpoint and load it into an engine of any layout; every rank calls this.

    Args:
        folder: the checkpoint.
        engine: what to load it into.
        verified: its contents have just been verified, so that only its sizes are looked at again.
        boundary: a new stage begins, whose optimizer may want more than the checkpoint holds: that begins anew.

    Raises:
        CheckpointError: if the checkpoint is damaged or holds another model; names the file.
    """
    verify(folder, hashes=not verified)
    state = engine.state()
    engine.load(load_tensors(without_what_lacks(state, folder) if boundary else state, folder))


def verify(folder: Path, hashes: bool = True) -> None:
    """Compare the files of a checkpoint with its manifest; every rank calls this.

    Args:
        folder: the checkpoint.
        hashes: compare contents, and not sizes alone.

    Raises:
        CheckpointError: if the checkpoint is damaged; names the file.
    """
    wrong = damage(folder, hashes)
    if wrong is not None:
        raise CheckpointError(f"the checkpoint is damaged: {wrong}; take an earlier one of the run, or a backup")


def _on_first_rank(folder: Path, action: Callable[[], None]) -> None:
    """Let the first rank write to `folder` while the others wait; where it fails, all of them raise its error."""
    said: list[str | None] = [None]
    if is_first_rank():
        try:
            with explained(folder):
                action()
        except CheckpointError as error:
            said = [str(error)]
    dist.broadcast_object_list(said)
    if said[0] is not None:
        raise CheckpointError(said[0])


def _write_texts(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
