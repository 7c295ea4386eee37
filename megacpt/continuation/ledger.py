"""The ledger: what a checkpoint has seen, stage after stage, as JSON that a person can read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megacpt.data.plan import DRAWN, Segment, Source, StagePlan
from megacpt.errors import CheckpointError, DataError

LEDGER = "ledger.json"
CONVERTED = "converted"  # kind of the stage that stands for all that weights from elsewhere have seen
FORMAT = 2
# What may differ between two runs that end with the same weights; the id of a ledger leaves it out.
VOLATILE = ("run", "layouts", "versions", "seconds")
# How far a stage is; the same stage at two moments differs in these.
PROGRESS = ("tokens", "steps", "consumed", "repeats", "rate", "phase", "controller")


@dataclass(frozen=True)
class StageRecord:
    """One stage of a lineage.

    Attributes:
        name: the stage's name.
        kind: ``trunk``, ``anneal`` or `CONVERTED`.
        run: the run folder it was trained in.
        tokens: tokens consumed so far.
        steps: optimizer steps made so far.
        seq_length: tokens of a sample.
        batch: sequences of an optimizer step.
        plan: which samples of which streams, in which shares.
        consumed: tokens by source (a source is a stream in a role).
        repeats: how many times each source's samples have been read in this stage, as a number of epochs.
        schedule: the schedule by value.
        entry_rate: the rate at which the parent stopped; None for a first stage.
        rate: the rate of the last step.
        phase: the phase of the schedule at the last step.
        optimizer: kind and settings of the optimizer.
        precision: arithmetic of the model.
        seed: the run's seed.
        layouts: the parallel layouts that took part, in order.
        versions: of the code and its engines.
        seconds: wall time.
        changes: what the stage changed against the one that it continues: key to the value before and after.
        carry: what became of the optimizer's state at the boundary; empty for a first stage.
        controller: state of the controller of the mixture; None without one.
    """

    name: str
    kind: str
    run: str
    tokens: int
    steps: int
    seq_length: int
    batch: int
    plan: StagePlan
    consumed: dict[str, int]
    repeats: dict[str, float]
    schedule: dict[str, Any]
    entry_rate: float | None
    rate: float | None
    phase: str | None
    optimizer: dict[str, Any]
    precision: str
    seed: int
    layouts: tuple[str, ...]
    versions: dict[str, str]
    seconds: float
    changes: dict[str, Any] = field(default_factory=dict)
    carry: dict[str, Any] = field(default_factory=dict)
    controller: dict[str, Any] | None = None

    def content(self) -> dict[str, Any]:
        """Return what was seen and how, as plain values: all but where it ran and where its streams lie."""
        found = {key: value for key, value in vars(self).items() if key not in VOLATILE}
        found["plan"] = self.plan.to_dict()
        for source in found["plan"]["sources"]:
            del source["path"]
        return found

    def identity(self) -> dict[str, Any]:
        """Return what says which stage it is, however far it got: its `content` without its progress."""
        found = self.content()
        for key in PROGRESS:
            del found[key]
        if self.controller is not None:
            del found["plan"]["phases"]  # a controller changes them on the way
        return found

    def is_same(self, other: StageRecord) -> bool:
        """Return whether both are the same stage, however far each got."""
        ours, theirs = self.identity(), other.identity()
        if self.controller is not None or other.controller is not None:
            ours["plan"].pop("phases", None)
            theirs["plan"].pop("phases", None)
        return ours == theirs


@dataclass(frozen=True)
class Ledger:
    """What a checkpoint has seen: its stages, oldest first; the last one is the current one.

    Attributes:
        parent: id of the checkpoint that the current run started from; None for a first run.
        parent_path: where that checkpoint was.
        tokenizer: spec, fingerprint and vocabulary size.
        model: the network's configuration.
        stages: oldest first.
        derived: how the weights were made, if not by training: the operation (as ``average``) and what went into it;
            ``optimizer: kept`` where the state of the optimizer and the place in the schedule went along.
    """

    parent: str | None
    parent_path: str | None
    tokenizer: dict[str, Any]
    model: dict[str, Any]
    stages: tuple[StageRecord, ...]
    derived: dict[str, Any] | None = None

    @property
    def stage(self) -> StageRecord:
        """The current stage."""
        return self.stages[-1]

    @property
    def weights_alone(self) -> bool:
        """Whether the checkpoint has no optimizer's state and no rate to go on from."""
        return self.derived is not None and self.derived.get("optimizer") != "kept"

    @property
    def tokens(self) -> int:
        """Tokens over the whole lineage."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def id(self) -> str:
        """Twelve hex digits that follow from what was seen and how, not from where or on how many ranks."""
        content = {key: value for key, value in vars(self).items() if key != "parent_path"}
        # The spec says where the tokenizer lies, the fingerprint what it is.
        content["tokenizer"] = {key: value for key, value in self.tokenizer.items() if key != "spec"}
        content["stages"] = [stage.content() for stage in self.stages]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def with_stage(self, **changes: Any) -> Ledger:
        """Return the ledger with changes to its current stage."""
        return replace(self, stages=(*self.stages[:-1], replace(self.stage, **changes)))

    def to_json(self) -> str:
        """Return the text of ``ledger.json``."""
        return json.dumps({"format": FORMAT, "id": self.id, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = LEDGER) -> Ledger:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: if the text is no ledger, or its id does not belong to its content.
        """
        try:
            content = json.loads(text)
            if content.pop("format") != FORMAT:
                raise ValueError(f"it is not of format {FORMAT}")
            found = content.pop("id")
            stages = tuple(_stage(stage) for stage in content.pop("stages"))
            ledger = cls(**content, stages=stages)
            own = ledger.id
        except (ValueError, KeyError, TypeError, AttributeError, DataError) as error:
            raise CheckpointError(f"{where} is no ledger: {error}") from error
        if found != own:
            raise CheckpointError(f"{where} was changed after it was written: its id is {found}, not {own}")
        return ledger

    @classmethod
    def read(cls, checkpoint: Path) -> Ledger:
        """Read the ledger of a checkpoint.

        Raises:
            CheckpointError: if it is missing or damaged.
        """
        return cls.read_file(checkpoint / LEDGER)

    @classmethod
    def read_file(cls, path: Path) -> Ledger:
        """Read a ledger; errors as `read`."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is no ledger: {error}") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error

    def consumed_segments(self) -> dict[str, tuple[Source, list[Segment]]]:
        """Return every stretch of samples that the lineage has consumed, by content hash of its stream.

        Replay of consumed samples adds no stretch: it reads what is in one already.
        """
        found: dict[str, tuple[Source, list[Segment]]] = {}
        for stage in self.stages:
            for source in stage.plan.sources:
                if source.policy in DRAWN:
                    continue
                samples = stage.consumed.get(source.name, 0) // stage.seq_length
                if not samples:
                    continue
                (segment,) = source.segments
                _, segments = found.setdefault(source.content_hash, (source, []))
                segments.append(replace(segment, count=samples))
        return found


def _stage(content: dict[str, Any]) -> StageRecord:
    unknown = set(content) ^ {field.name for field in fields(StageRecord)}
    if unknown:
        raise ValueError(f"missing or unknown keys of a stage: {', '.join(sorted(unknown))}")
    plan = StagePlan.from_dict(content["plan"])
    return StageRecord(**{**content, "plan": plan, "layouts": tuple(content["layouts"])})
