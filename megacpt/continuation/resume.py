"""What a resume may change, and what it is told where it may not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megacpt.config import RunConfig, load_run
from megacpt.continuation.boundary import RUN
from megacpt.continuation.changes import differences, flat, settings, shown
from megacpt.continuation.ledger import Ledger
from megacpt.data.plan import Source
from megacpt.data.stream import META_FILE, StreamMeta
from megacpt.data.tokenizer import load_tokenizer
from megacpt.errors import CheckpointError, ConfigError
from megacpt.optim.schedules import schedule_from_dict

log = logging.getLogger(__name__)


def check_resume(config: RunConfig, start: Ledger, parent: Path | None) -> None:
    """Refuse a resume that would change what the run computes.

    Layout, microbatch, logging, saving and evaluation may differ, and streams and tokenizer may have moved: of them
    the content matters.

    Args:
        config: the configuration of the resume.
        start: the ledger at the start of the run.
        parent: the checkpoint named by ``continue`` or ``anneal``; None for ``train``.

    Raises:
        ConfigError: with every key that changed, its value before and now, and how a new stage is started instead.
    """
    if parent is not None and Ledger.read(parent).id != start.parent:
        raise ConfigError(
            f"{config.run} holds a run that was started from another checkpoint ({start.parent_path}); "
            "give the new stage a folder of its own with --run"
        )
    if start.derived is not None:
        raise ConfigError(
            f"{config.run} holds weights that no training made ({start.derived.get('operation')}), and no run to go on "
            f"with; start a stage on them with `megacpt continue {config.run} STAGE.yaml --run NEW_FOLDER`"
        )
    saved = load_run(config.run / RUN)
    changed = differences(_begun(saved, start), settings(config))
    if "stage.tokens" in changed and schedule_from_dict(start.stage.schedule).horizon_free:
        # A schedule without a horizon gives the same past whatever the length: the run may become longer.
        before, now = changed.pop("stage.tokens")
        log.warning(
            "%s: the stage ends at %s tokens now, and not at %s; the schedule stays where it was",
            config.run,
            f"{now:,}",
            f"{before:,}",
        )
    said = [f"  {key}: {shown(before)} -> {shown(now)}" for key, (before, now) in changed.items()]
    said += [f"  {line}" for line in (*_other_tokenizer(config, start), *_other_streams(config, start))]
    if said:
        raise ConfigError(
            f"{config.run} holds a run with other settings. A run goes on exactly as it began; changed:\n"
            + "\n".join(said)
            + f"\nStart a new stage on it with `megacpt continue {config.run} STAGE.yaml --run NEW_FOLDER`, "
            "or give another folder with run=NEW_FOLDER"
        )


def _begun(saved: RunConfig, start: Ledger) -> dict[str, Any]:
    """Return the settings that the run began with.

    run.yaml is a file that a person may change; what the ledger says too is taken from there.
    """
    stage, schedule = start.stage, schedule_from_dict(start.stage.schedule)
    known: dict[str, Any] = {
        "seed": stage.seed,
        "model": {name: value for name, value in start.model.items() if name != "name"},
        "optim": stage.optimizer,
        "precision": stage.precision,
        "batch": {"sequences": stage.batch, "seq_length": stage.seq_length},
    }
    if not schedule.horizon_free:
        known["stage"] = {"tokens": schedule.horizon}
    begun = flat(known)
    within = tuple(f"{key}." for key in begun)  # such as the keys of a scaling that the run began without
    return {**{key: value for key, value in settings(saved).items() if not key.startswith(within)}, **begun}


def _other_tokenizer(config: RunConfig, start: Ledger) -> Iterator[str]:
    now, begun = load_tokenizer(config.tokenizer), start.tokenizer
    if now.fingerprint != begun["fingerprint"]:
        yield (
            f"tokenizer: {begun['spec']} (fingerprint {begun['fingerprint'][:12]}) -> "
            f"{config.tokenizer} ({now.fingerprint[:12]})"
        )


def _other_streams(config: RunConfig, start: Ledger) -> Iterator[str]:
    """Name the streams of the mixture whose content is another one than the plan has."""
    planned = {source.name: source for source in start.stage.plan.sources if source.role == "new"}
    for name, stream in config.stage.mixture.items():
        source = planned.get(name)
        if source is None or not (stream.path / META_FILE).is_file():  # opening it says what is missing
            continue
        now = StreamMeta.read(stream.path).content_hash
        if now != source.content_hash:
            yield (
                f"stage.mixture.{name}: the stream {source.path} with the content hash {source.content_hash[:12]} -> "
                f"{stream.path} with {now[:12]}"
            )


def find_data(start: Ledger, config: RunConfig) -> Ledger:
    """Return the ledger at the start of a run with the streams that its configuration names where they are now.

    They may have moved, with the run or without it. Those of the lineage that are replayed are where they were.
    """
    now = {name: str(Path(stream.path).resolve()) for name, stream in config.stage.mixture.items()}
    given = [stream.path for stream in config.stage.replay.streams.values() if (stream.path / META_FILE).is_file()]
    outside = {StreamMeta.read(path).content_hash: str(path.resolve()) for path in given}

    def path(source: Source) -> str:
        if source.policy == "external":
            return outside.get(source.content_hash, source.path)
        return now.get(source.name, source.path) if source.role == "new" else source.path

    plan = start.stage.plan
    return start.with_stage(plan=replace(plan, sources=tuple(replace(s, path=path(s)) for s in plan.sources)))


def parent_of(start: Ledger) -> Path | None:
    """Return the checkpoint that a run starts from, which has to be where it was.

    Raises:
        CheckpointError: if it is gone.
    """
    if start.parent_path is None:
        return None
    path = Path(start.parent_path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is gone: it is the checkpoint that this run starts from, and the run has none of its own yet"
        )
    return path
