"""Where a stage begins: from nothing, from a checkpoint, as a release branch; and what a resume may change."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel

from megacpt import __version__
from megacpt.checkpoint.store import find_checkpoint
from megacpt.config import Duration, RunConfig, dump, load_run, overlay
from megacpt.config.yaml_text import read_document
from megacpt.continuation.ledger import Ledger, StageRecord
from megacpt.continuation.planning import plan_stage
from megacpt.data.files import disk_full, write_bytes
from megacpt.data.tokenizer import Tokenizer, load_tokenizer
from megacpt.errors import CheckpointError, ConfigError
from megacpt.optim.building import build_schedule, stage_peak
from megacpt.optim.schedules import Schedule, schedule_from_dict

log = logging.getLogger(__name__)
START = "start.json"
RUN = "run.yaml"
# What decides the numbers of a run. The rest (layout, microbatch, logging, saving, evaluation) may change at any time.
FIXED = ("seed", "model", "tokenizer", "stage", "schedule", "optim", "precision", "batch.sequences", "batch.seq_length")
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
    steps = Ledger.read(parent).stage.steps
    if steps < trunk.stage_steps:
        log.warning(
            "%s is at step %d of %d of its stage; the new stage goes on from there", parent, steps, trunk.stage_steps
        )
    return overlay(trunk, stage_file, overrides, run), parent


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
    stage = trunk.stage.model_dump()
    stage.update(name=f"{trunk.stage.name}-anneal", kind="anneal", tokens=length)
    lowest = getattr(trunk.schedule, "min_lr", None)
    schedule = {"kind": "anneal"} if lowest is None else {"kind": "anneal", "min_lr": str(lowest)}
    return overlay(trunk, {"stage": stage, "schedule": schedule}, overrides, run), parent


def first_ledger(config: RunConfig, parent: Path | None) -> Ledger:
    """Return the ledger at the start of a run: what the parent has seen, and an empty current stage.

    Args:
        config: the run.
        parent: the checkpoint it starts from; None for new weights.

    Raises:
        ConfigError: if the schedule would jump, or there is nothing to replay.
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
    record = _record(config, before, parent, tokenizer)
    return Ledger(
        parent=None if before is None else before.id,
        parent_path=None if parent is None else str(parent.resolve()),
        tokenizer={"spec": tokenizer.spec, "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        model=config.model.model_dump(mode="json"),
        stages=(*(() if before is None else before.stages), record),
    )


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


def check_resume(config: RunConfig, start: Ledger, parent: Path | None) -> None:
    """Refuse a resume that would change what the run computes.

    Args:
        config: the configuration of the resume.
        start: the ledger at the start of the run.
        parent: the checkpoint named by ``continue`` or ``anneal``; None for ``train``.

    Raises:
        ConfigError: with the names of what changed, and how a new stage is started instead.
    """
    if parent is not None and Ledger.read(parent).id != start.parent:
        raise ConfigError(
            f"{config.run} holds a run that was started from another checkpoint ({start.parent_path}); "
            "give the new stage a folder of its own with --run"
        )
    saved = _wherever_its_data(load_run(config.run / RUN))
    config = _wherever_its_data(config)
    changed = [key for key in FIXED if _value(saved, key) != _value(config, key) or _was_edited(config, start, key)]
    if "stage" in changed and schedule_from_dict(start.stage.schedule).horizon_free:
        # A schedule without a horizon gives the same past whatever the length: the run may become longer.
        longer = saved.stage.model_copy(update={"tokens": config.stage.tokens})
        if longer == config.stage:
            changed.remove("stage")
            log.warning(
                "%s: the stage ends at %s tokens now, and not at %s; the schedule stays where it was",
                config.run,
                f"{int(config.stage.tokens):,}",
                f"{int(saved.stage.tokens):,}",
            )
    if changed:
        raise ConfigError(
            f"{config.run} holds a run with other settings: {', '.join(changed)} changed. A run goes on exactly as it "
            f"began; start a new stage on it with `megacpt continue {config.run} STAGE.yaml --run NEW_FOLDER`, "
            "or give another folder with run=NEW_FOLDER"
        )


def _was_edited(config: RunConfig, start: Ledger, key: str) -> bool:
    """Whether the ledger at the start of the run says otherwise; run.yaml is a file that a person may change."""
    stage, schedule = start.stage, schedule_from_dict(start.stage.schedule)
    if key == "stage":
        return not schedule.horizon_free and schedule.horizon != config.stage.tokens
    begun = {
        "seed": stage.seed,
        "model": start.model,
        "optim": stage.optimizer,
        "precision": stage.precision,
        "batch.sequences": stage.batch,
        "batch.seq_length": stage.seq_length,
    }
    if key not in begun:
        return False
    value, said = _value(config, key), begun[key]
    if isinstance(value, BaseModel) and isinstance(said, dict):
        now = value.model_dump(mode="json")
        return any(now.get(name) != what for name, what in said.items())
    return value != said


def _wherever_its_data(config: RunConfig) -> RunConfig:
    """Return the run without the paths of its streams: what matters of them is their content, which the plan names."""
    mixture = {name: s.model_copy(update={"path": Path()}) for name, s in config.stage.mixture.items()}
    return config.model_copy(update={"stage": config.stage.model_copy(update={"mixture": mixture})})


def find_data(start: Ledger, config: RunConfig) -> Ledger:
    """Return the ledger at the start of a run with the streams of its mixture where they are now.

    They may have moved, with the run or without it. Those that are replayed are where they were.
    """
    now = {name: str(Path(stream.path).resolve()) for name, stream in config.stage.mixture.items()}
    plan = start.stage.plan
    sources = (replace(s, path=now.get(s.name, s.path)) if s.role == "new" else s for s in plan.sources)
    return start.with_stage(plan=replace(plan, sources=tuple(sources)))


def _value(config: RunConfig, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _record(config: RunConfig, before: Ledger | None, parent: Path | None, tokenizer: Tokenizer) -> StageRecord:
    entry = None if before is None else before.stage.rate
    schedule = _schedule(config, before, parent)
    first = schedule.rate(config.tokens_per_step, config.stage.tokens, entry)
    rewarmed = schedule.kind == "wsd_s" or (schedule.kind == "rewarmed_cosine" and schedule.warmup > 0)
    if before is not None and entry is not None and not rewarmed:
        _refuse_jump(first, entry, before, parent)
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
        versions=_versions(),
        seconds=0.0,
    )


def _schedule(config: RunConfig, before: Ledger | None, parent: Path | None) -> Schedule:
    """Go on with the parent's schedule where the stage keeps it and it has no horizon; else start the stage's own."""
    trunks = 0 if before is None else sum(stage.kind == "trunk" for stage in before.stages)
    # A branch is annealed from the peak of the trunk stage that it leaves.
    peak = stage_peak(config.optim, max(trunks - 1, 0) if config.stage.kind == "anneal" else trunks)
    own = build_schedule(config.schedule, peak, config.stage.tokens, config.tokens_per_step)
    if before is None or parent is None:
        return own
    running = schedule_from_dict(before.stage.schedule)
    if own.kind == running.kind == "wsd_s":
        # Further releases, from the peak where the last one left it.
        return replace(own, warmup=0) if before.stage.tokens >= running.warmup else own
    if load_run(parent / RUN).schedule == config.schedule and running.peak == peak and running.horizon_free:
        return replace(running, offset=running.offset + before.stage.tokens)
    return own


def _refuse_jump(first: float, entry: float, before: Ledger, parent: Path | None) -> None:
    """Refuse to continue an annealed checkpoint at a rate that nothing has warmed up to."""
    annealed = before.stage.kind == "anneal" or before.stage.phase in ("decay", "done")
    if annealed and first > JUMP * entry:
        raise ConfigError(
            f"schedule: {parent} is annealed (its rate went down to {entry:.3g}), and the stage would start at "
            f"{first:.3g}, a jump that forgets. Continue the trunk instead ({before.parent_path or 'its parent'}), or "
            "re-warm: schedule.kind=rewarmed_cosine"
        )


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in ("torch", "megatron-core", "numpy")}
    return {"megacpt": __version__, "python": platform.python_version(), **found}


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
