"""Where a stage begins: from nothing, from a checkpoint, as a release branch."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megacpt import __version__
from megacpt.checkpoint.store import find_checkpoint
from megacpt.config import Duration, ModelConfig, RunConfig, dump, load_run, overlay
from megacpt.config.base import Problem
from megacpt.config.fixed import model_problems
from megacpt.config.upcycle import KEY
from megacpt.config.yaml_text import read_document
from megacpt.continuation.carry import carry_record
from megacpt.continuation.changes import differences, settings
from megacpt.continuation.ledger import CONVERTED, Ledger, StageRecord
from megacpt.continuation.planning import plan_stage
from megacpt.continuation.planning.settled import settled
from megacpt.data.files import disk_full, write_bytes
from megacpt.data.tokenizer import Tokenizer, load_tokenizer
from megacpt.errors import ConfigError
from megacpt.optim.building import build_schedule, stage_peak
from megacpt.optim.schedules import Schedule, schedule_from_dict

log = logging.getLogger(__name__)
START = "start.json"
RUN = "run.yaml"
# What every stage has of its own; the record of the stage says it.
OWN = ("stage.name", "stage.kind", "stage.tokens")
# A rate may start this much above the one its parent stopped at without being called a jump.
JUMP = 1.5


def continued_config(
    checkpoint: Path, stage_file: Path, run: Path | None, overrides: Sequence[str]
) -> tuple[RunConfig, Path]:
    """Return the configuration of a new stage on a checkpoint, and the checkpoint.

    Args:
        checkpoint: a checkpoint, or a run folder for its newest.
        stage_file: the stage; keys that it does not name are those of the checkpoint's run.
        run: folder of the new run, if the stage file does not name it.
        overrides: ``KEY=VALUE``.
    """
    parent = find_checkpoint(checkpoint)
    trunk = load_run(parent / RUN)
    named = run is not None or any(word.startswith("run=") for word in overrides)
    if not named and "run" not in read_document(stage_file).data:
        raise ConfigError(f"continue needs a folder for the new run: add --run runs/NAME (the parent is {trunk.run})")
    stage = Ledger.read(parent).stage
    if stage.kind == CONVERTED:  # no run of it was trained, whose settings could go on
        _refuse_unsaid(parent, stage_file, overrides)
        return overlay(trunk, stage_file, overrides, run, anew=("optim", "batch")), parent
    if (steps := stage.steps) < trunk.stage_steps:
        log.warning(
            "%s is at step %d of %d of its stage; the new stage goes on from there", parent, steps, trunk.stage_steps
        )
    return overlay(trunk, stage_file, overrides, run), parent


def _refuse_unsaid(parent: Path, stage_file: Path, overrides: Sequence[str]) -> None:
    """Refuse a first stage on converted weights that does not say how it trains."""
    said = read_document(stage_file).data
    named = {"optim"} if isinstance(said.get("schedule"), str) else set()  # it brings its peak
    named |= said.keys() | {word.partition(".")[0] for word in overrides}
    missing = [key for key in ("optim", "batch") if key not in named]
    if missing:
        raise ConfigError(
            f"{parent} was converted, and has no settings of training to go on with: the stage has to give "
            f"{' and '.join(missing)}, such as optim.peak_lr=2e-5 batch.sequences=64 batch.seq_length=2048"
        )


def annealed_config(checkpoint: Path, tokens: str, run: Path, overrides: Sequence[str]) -> tuple[RunConfig, Path]:
    """Return the configuration of a release branch: the same mixture, the rate going down to the end.

    Args:
        checkpoint: a trunk's checkpoint, or its run folder for the newest.
        tokens: length of the branch, absolute or as a percentage of the trunk's stage.
        run: folder of the branch.
        overrides: ``KEY=VALUE``.

    Raises:
        ConfigError: if `tokens` is no length, or the configuration is wrong.
    """
    parent = find_checkpoint(checkpoint)
    trunk = load_run(parent / RUN)
    try:
        length = Duration.parse(tokens).tokens(trunk.stage.tokens, trunk.tokens_per_step)
    except ValueError as error:
        raise ConfigError(f"--tokens: '{tokens}': {error}") from error
    stage = settled(trunk, Ledger.read(parent).stage)
    stage.update(name=f"{trunk.stage.name}-anneal", kind="anneal", tokens=length)
    stage.pop("carry", None)  # what the trunk did when it began is done
    lowest = getattr(trunk.schedule, "min_lr", None)
    schedule = {"kind": "anneal"} if lowest is None else {"kind": "anneal", "min_lr": str(lowest)}
    return overlay(trunk, {"stage": stage, "schedule": schedule}, overrides, run), parent


def first_ledger(config: RunConfig, parent: Path | None) -> Ledger:
    """Return the ledger at the start of a run: what the parent has seen, and an empty current stage.

    Args:
        config: the run.
        parent: the checkpoint it starts from; None for new weights.

    Raises:
        ConfigError: if the schedule would jump, the model is another, or there is nothing to replay.
        DataError: if a stream does not fit.
        CheckpointError: if the parent's ledger is damaged.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    before = None if parent is None else Ledger.read(parent)
    if before is not None and before.tokenizer["fingerprint"] != tokenizer.fingerprint:
        raise ConfigError(
            f"tokenizer: the checkpoint was trained with {before.tokenizer['spec']} (fingerprint "
            f"{before.tokenizer['fingerprint'][:12]}), and {config.tokenizer} is another "
            f"({tokenizer.fingerprint[:12]}); a stage cannot change it"
        )
    problems = list(_model_problems(config, before))
    if problems:
        raise ConfigError("\n".join(map(str, problems)))
    if before is not None:
        _warn_other_levels(config, before)
    record = _record(config, before, parent, tokenizer)
    return Ledger(
        parent=None if before is None else before.id,
        parent_path=None if parent is None else str(parent.resolve()),
        tokenizer=tokenizer_record(tokenizer),
        model=config.model.model_dump(mode="json"),
        stages=(*(() if before is None else before.stages), record),
    )


def tokenizer_record(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what the ledger keeps of a tokenizer."""
    return {"spec": tokenizer.spec, "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}


def create_run(config: RunConfig, ledger: Ledger) -> None:
    """Create a run folder with its configuration and the ledger at its start; one process does this.

    Raises:
        ConfigError: if it cannot be written.
    """
    try:
        config.run.mkdir(parents=True, exist_ok=True)
        write_bytes(config.run / RUN, dump(config).encode())
        write_bytes(config.run / START, ledger.to_json().encode())
    except OSError as error:
        why = disk_full(error) or error.strerror
        raise ConfigError(f"run: {config.run} cannot be written ({error.filename}: {why})") from error


def started(run: Path) -> Ledger | None:
    """Return the ledger at the start of a run, or None if the folder holds no run."""
    path = run / START
    return Ledger.read_file(path) if path.is_file() else None


def _model_problems(config: RunConfig, before: Ledger | None) -> Iterator[Problem]:
    upcycle = config.stage.carry.upcycle
    if before is not None:
        yield from model_problems(ModelConfig.model_validate(before.model), config.model, upcycle)
    elif upcycle is not None:
        text = f"{upcycle}: a first stage begins with new weights, there is nothing to make experts of: remove the key"
        yield Problem(KEY, text)


def _warn_other_levels(config: RunConfig, before: Ledger) -> None:
    """Say that the model computes something else from here on, though its weights are the same."""
    was, now = ModelConfig.model_validate(before.model).quantise, config.model.quantise
    if was != now:
        names = ["float" if each is None else each.grid for each in (was, now)]
        log.warning(
            "model.quantise changes (%s -> %s): the weights go on as they are, and the model computes another function "
            "with them; let the rate warm up again if the loss jumps",
            *names,
        )


def _record(config: RunConfig, before: Ledger | None, parent: Path | None, tokenizer: Tokenizer) -> StageRecord:
    entry = None if before is None else 0.0 if before.weights_alone else before.stage.rate
    schedule = _schedule(config, before, parent)
    if before is not None:
        _refuse_cold(schedule, config, before, parent)
        _refuse_jump(schedule, config, before, parent)
    return StageRecord(
        name=config.stage.name,
        kind=config.stage.kind,
        run=str(config.run),
        tokens=0,
        steps=0,
        seq_length=config.batch.seq_length,
        batch=config.batch.sequences,
        plan=plan_stage(config, before, tokenizer),
        consumed={},
        repeats={},
        schedule=schedule.to_dict(),
        entry_rate=entry,
        rate=None,
        phase=None,
        optimizer=config.optim.model_dump(mode="json"),
        precision=config.precision,
        seed=config.seed,
        layouts=(),
        versions=versions(),
        seconds=0.0,
        changes=_changes(config, parent),
        carry=carry_record(config, before),
    )


def _changes(config: RunConfig, parent: Path | None) -> dict[str, Any]:
    """Return the settings that differ from those of the parent's run; a stage always has its own name and length."""
    if parent is None:
        return {}
    found = differences(settings(load_run(parent / RUN)), settings(config))
    if Ledger.read(parent).stage.kind == CONVERTED:
        found = {key: pair for key, pair in found.items() if key.startswith("model.")}
    return {key: list(pair) for key, pair in found.items() if key not in OWN}


def _schedule(config: RunConfig, before: Ledger | None, parent: Path | None) -> Schedule:
    """Go on with the parent's schedule where the stage keeps it and it has no horizon; else start the stage's own."""
    trunks = 0 if before is None else sum(stage.kind == "trunk" for stage in before.stages)
    # A branch is annealed from the peak of the trunk stage that it leaves.
    peak = stage_peak(config.optim, max(trunks - 1, 0) if config.stage.kind == "anneal" else trunks)
    own = build_schedule(config.schedule, peak, config.stage.tokens, config.tokens_per_step)
    if before is None or parent is None or before.weights_alone:
        return own
    running = schedule_from_dict(before.stage.schedule)
    if own.kind == running.kind == "wsd_s":
        # Further releases, from the peak where the last one left it.
        return replace(own, warmup=0) if before.stage.tokens >= running.warmup else own
    if load_run(parent / RUN).schedule == config.schedule and running.peak == peak and running.horizon_free:
        return replace(running, offset=running.offset + before.stage.tokens)
    return own


def _refuse_cold(schedule: Schedule, config: RunConfig, before: Ledger, parent: Path | None) -> None:
    """Refuse to begin at a high rate on weights that come without an optimizer's state."""
    if not before.weights_alone or (schedule.kind != "anneal" and schedule.warmup > config.tokens_per_step):
        return
    way = "schedule.warmup=1%, or longer"
    if schedule.kind == "anneal":
        way = "begin a trunk stage with schedule.kind=rewarmed_cosine, whose rate goes up and then down"
    raise ConfigError(
        f"schedule: {parent} holds weights alone ({(before.derived or {}).get('operation')}): the optimizer begins "
        f"anew, and with it the rate has to rise over more than one step. Let it warm up: {way}"
    )


def _refuse_jump(schedule: Schedule, config: RunConfig, before: Ledger, parent: Path | None) -> None:
    """Refuse to continue an annealed checkpoint at a rate that nothing has warmed up to."""
    entry = before.stage.rate
    annealed = before.stage.kind == "anneal" or before.stage.phase in ("decay", "done")
    if entry is None or not annealed or before.weights_alone:
        return
    first = schedule.rate(config.tokens_per_step, config.stage.tokens, entry)
    if schedule.kind == "rewarmed_cosine" and schedule.warmup > 0:
        log.warning("%s is annealed: its rate, %.3g, goes up again, and some is forgotten by it", parent, entry)
    elif schedule.kind != "wsd_s" and first > JUMP * entry:
        raise ConfigError(
            f"schedule: {parent} is annealed (its rate went down to {entry:.3g}), and the stage would start at "
            f"{first:.3g}, a jump that forgets. Continue the trunk instead ({before.parent_path or 'its parent'}), or "
            "re-warm: schedule.kind=rewarmed_cosine"
        )


def versions() -> dict[str, str]:
    """Return the versions of the code and its engines, as the ledger keeps them."""
    found = {name: version(name) for name in ("torch", "megatron-core", "numpy")}
    return {"megacpt": __version__, "python": platform.python_version(), **found}
