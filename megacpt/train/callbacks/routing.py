"""Where experts are sent the tokens of held-out streams during training, and how that changes after a boundary."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megacpt.continuation.ledger import Ledger
from megacpt.data.files import disk_full
from megacpt.engine.protocol import StepReport
from megacpt.errors import DataError, SetupError
from megacpt.evaluate.choices import (
    Reference,
    References,
    StreamChoices,
    by_expert,
    measures,
    read_references,
    stream_choices,
    stream_information,
    write_references,
)
from megacpt.runtime.layout import is_first_rank
from megacpt.train.callbacks import Quiet
from megacpt.train.callbacks.evaluation import Evaluation
from megacpt.train.callbacks.metrics import Metrics
from megacpt.train.loop import Run

log = logging.getLogger(__name__)
REFERENCES = "routing.npz"
DIGITS = 6  # of the numbers in a line


class Routing(Quiet):
    """Measures the routing of the held-out streams whenever their losses are measured; only for models with experts.

    Choices are compared with those before the first step of the stage, and with those at the end of the stage that
    the stream was new in. Both are in the run folder, and stay as they are when the run is resumed: the ends of earlier
    stages are taken over from the folder of the run that the stage continues.

    Args:
        metrics: where the numbers are written (lines of kind ``routing`` and ``information``).
        evaluation: says when and on which streams; it acts before this callback.
    """

    name = "routing"

    def __init__(self, metrics: Metrics, evaluation: Evaluation) -> None:
        self.metrics, self.evaluation = metrics, evaluation
        self.experts = 0
        self.references: References = {}

    def on_start(self, run: Run) -> None:
        """Measure before the first step of the stage, and keep the choices to compare with; read them at a resume."""
        moe = run.config.model.moe
        if moe is None or run.config.evaluate.routing is None:
            return
        self.experts = moe.experts
        path = run.config.run / REFERENCES
        if run.step:
            self.references = _known(path)
            return
        found = self._choices(run)
        if is_first_rank():
            self.references = _at_start(run, found)
            _write(path, self.references)
            self._record(run, found)

    def on_step(self, run: Run, report: StepReport) -> None:  # noqa: ARG002
        """Measure when it is due."""
        if self.experts and run.step in self.evaluation.grid:
            found = self._choices(run)
            if is_first_rank():
                self._record(run, found)

    def _choices(self, run: Run) -> dict[str, StreamChoices]:
        """The choices for each held-out stream; every rank takes part."""
        config, settings = run.config, run.config.evaluate
        length, tokens = settings.seq_length or config.batch.seq_length, int(settings.routing or 0)
        found = {
            name: stream_choices(run.engine, stream, length, tokens, config.batch.microbatch)
            for name, stream in self.evaluation.streams.items()
        }
        return {name: choices for name, choices in found.items() if choices is not None}

    def _record(self, run: Run, found: Mapping[str, StreamChoices]) -> None:
        """Write a line for each stream, and one for all of them where there are several."""
        at = {"step": run.step, "tokens": run.tokens, "lineage_tokens": run.lineage_tokens}
        for stream, choices in found.items():
            numbers = measures(choices, self.experts)
            for group, references in self.references.items():
                same = references[stream].saturation(choices) if stream in references else None
                if same is not None:
                    numbers[f"saturation_{group}"] = same
            # Numbers of single experts are many: only those at both ends of a stage are kept.
            single = by_expert(choices, self.experts) if run.step == 0 or run.done else {}
            line = {"kind": "routing", **at, "stream": stream, "layers": choices.layers, **numbers, **single}
            self.metrics.write(_rounded(line))
            self._show(run.step, stream, choices.layers, numbers)
        if len(found) > 1:
            layers = next(iter(found.values())).layers
            shared = stream_information(found, self.experts)
            line = {"kind": "information", **at, "streams": list(found), "layers": layers, **shared}
            self.metrics.write(_rounded(line))
            self._show(run.step, "streams", layers, shared)

    def _show(self, step: int, stream: str, layers: Sequence[int], numbers: Mapping[str, Sequence[float]]) -> None:
        """Give TensorBoard each number, and its mean over the layers."""
        board = self.metrics.board
        if board is None:
            return
        for name, values in numbers.items():
            board.add_scalar(f"routing/{name}/{stream}", sum(values) / len(values), step)
            for layer, value in zip(layers, values, strict=True):
                board.add_scalar(f"routing_layers/{name}/{stream}/layer-{layer}", value, step)


def _at_start(run: Run, found: Mapping[str, StreamChoices]) -> References:
    """What a stage compares with: its start, and for older streams the end of their own stage.

    The end of the stage before is the start of this one: the weights are the same, and a boundary that changes the
    routing itself is no change by training.
    """
    start = {stream: Reference(choices.sample, choices.experts) for stream, choices in found.items()}
    homes = _homes(run.start)
    last = len(run.start.stages) - 2
    earlier = run.start.parent_path if any(home < last for home in homes.values()) else None
    # RUN/checkpoints/step-00001234
    known = {} if earlier is None else _known(Path(earlier).parent.parent / REFERENCES).get("home", {})
    own = {stream: start.get(stream) if home == last else known.get(stream) for stream, home in homes.items()}
    return {"start": start, "home": {stream: one for stream, one in own.items() if one is not None and stream in found}}


def _homes(start: Ledger) -> dict[str, int]:
    """The earlier stage, from 0, that each stream was new in for the first time."""
    homes: dict[str, int] = {}
    for number, stage in enumerate(start.stages[:-1]):
        for source in stage.plan.sources:
            if source.role == "new":
                homes.setdefault(source.name, number)
    return homes


def _known(path: Path) -> References:
    """The references of a run folder; none, and a word about it, where they cannot be read."""
    if not is_first_rank():
        return {}
    try:
        return read_references(path)
    except DataError as error:
        log.warning("%s. Routing is measured without this comparison", error)
        return {}


def _write(path: Path, references: References) -> None:
    try:
        write_references(path, references)
    except OSError as error:
        raise SetupError(
            f"{path} cannot be written: {disk_full(error) or error.strerror}. Make room, and run the same command "
            "again; or set evaluate.routing to null"
        ) from error


def _rounded(value: Any) -> Any:
    """The numbers of a line without digits that say nothing, and null for those without meaning."""
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value
