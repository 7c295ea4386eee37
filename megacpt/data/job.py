"""What one call of `prepare` is about, what it finished before, and what has changed since."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megacpt.data.files import write_json
from megacpt.data.inputs import Shard, cut, describe, find_files, shard_name
from megacpt.data.parts import TRAIN, VALID, Recipe, finished_part
from megacpt.data.stream import META_FILE, StreamMeta
from megacpt.data.tokenizer import Tokenizer
from megacpt.errors import DataError

_JOB_FILE = "job.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One call of `prepare`: what to write, how, and the shards of the input (described by `sources`)."""

    out: Path
    recipe: Recipe
    tokenizer: Tokenizer
    sources: list[dict[str, Any]]
    shards: list[Shard]

    @classmethod
    def plan(
        cls,
        inputs: Sequence[str | Path],
        tokenizer: Tokenizer,
        out: Path,
        field: str,
        holdout: float,
        shard_bytes: int,
        score: str | None = None,
    ) -> Job:
        """Find the input and cut it; raise DataError for input that is missing, empty or given twice."""
        found = find_files(inputs)
        recipe = Recipe(tokenizer.spec, tokenizer.fingerprint, field, holdout, score)
        shards = cut([piece for pieces in found for piece in pieces], shard_bytes)
        return cls(out.absolute(), recipe, tokenizer, describe(inputs, found), shards)

    @property
    def partial(self) -> Path:
        """The folder of everything unfinished, beside the stream."""
        return self.out.with_name(f"{self.out.name}.partial")

    @property
    def parts_folder(self) -> Path:
        """The folder of the parts."""
        return self.partial / "parts"

    def target(self, split: str) -> Path:
        """Return the stream folder of `split`."""
        return self.out if split == TRAIN else self.out.with_name(f"{self.out.name}-{VALID}")

    def done(self) -> StreamMeta | None:
        """Return the description of the stream if this job is done; refuse anything else that is there."""
        made = {split: self.made(split) for split in self.recipe.splits}
        return made[TRAIN] if all(made.values()) else None

    def made(self, split: str) -> StreamMeta | None:
        """Return the description of the stream of `split` if this job made it; refuse anything else there."""
        target = self.target(split)
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return None
        if not (target / META_FILE).is_file():
            raise DataError(f"{target} exists and is no token stream: choose another --out, or remove it")
        meta = StreamMeta.read(target)
        before = {
            **meta.settings,
            "sources": meta.sources,
            "tokenizer_fingerprint": meta.tokenizer_fingerprint,
        }
        changes = _changes({"tokenizer": meta.tokenizer, **before}, self._identity(), with_sources=True)
        if changes:
            raise DataError(
                f"the stream {target} exists, and was made from something else: {'; '.join(changes)}. Choose "
                f"another --out, or remove {target} to make it again"
            )
        return meta

    def _identity(self) -> dict[str, Any]:
        return {**asdict(self.recipe), "sources": self.sources}

    def begin(self) -> None:
        """Note what the parts are for; explain what changed since they were begun."""
        path = self.partial / _JOB_FILE
        if path.is_file():
            before = json.loads(path.read_bytes())
            changes = _changes(before, self._identity(), with_sources=False)
            if changes:
                raise DataError(
                    f"{self.partial} holds the unfinished parts of another job: {'; '.join(changes)}. Give "
                    f"the same values again to go on, or remove {self.partial} to start over"
                )
            for change in _source_changes(before["sources"], self.sources):
                _log.warning("%s since %s was begun: its parts are made again, others are kept", change, self.out)
        self.parts_folder.mkdir(exist_ok=True)
        write_json(path, self._identity())

    def kept(self) -> str:
        """Say how much is finished."""
        finished = sum(finished_part(self.parts_folder, shard_name(shard)) is not None for shard in self.shards)
        return f"{finished} of {len(self.shards)} parts are finished and kept in {self.partial}"


def _changes(before: dict[str, Any], now: dict[str, Any], with_sources: bool) -> list[str]:
    changes = []
    if before["tokenizer_fingerprint"] != now["tokenizer_fingerprint"]:
        changes.append(
            f"the tokenizer was {before['tokenizer']} ({before['tokenizer_fingerprint'][:12]}) and is now "
            f"{now['tokenizer']} ({now['tokenizer_fingerprint'][:12]})"
        )
    for key in ("field", "holdout", "score"):
        if before.get(key) != now[key]:
            changes.append(f"{key} was {before.get(key)!r} and is now {now[key]!r}")
    return changes + (_source_changes(before["sources"], now["sources"]) if with_sources else [])


def _source_changes(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[str]:
    old, new = ({source["path"]: source for source in sources} for sources in (before, now))
    changes = [f"the input {path} is no longer given" for path in old if path not in new]
    changes += [f"the input {path} was not given before" for path in new if path not in old]
    for path in (path for path in new if path in old and old[path] != new[path]):
        was, has = old[path], new[path]
        change = f"from {was['files']:,} files and {was['bytes']:,} bytes to {has['files']:,} and {has['bytes']:,}"
        if (was["files"], was["bytes"]) == (has["files"], has["bytes"]):
            change = "(a name or a modification time)"
        changes.append(f"the input {path} has changed {change}")
    if not changes and list(old) != list(new):
        changes.append("the inputs have changed their order")
    return changes
