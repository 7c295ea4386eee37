"""Metrics as JSON lines and for TensorBoard."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacpt.data.files import disk_full, write_bytes
from megacpt.engine.protocol import StepReport
from megacpt.errors import SetupError
from megacpt.evaluate.loss import StreamLoss
from megacpt.runtime.layout import is_first_rank
from megacpt.train.callbacks import Quiet, due
from megacpt.train.loop import Run

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
# Charts of several curves each, on TensorBoard's page "custom scalars".
CHARTS = {
    "lineage": {
        "held-out, bits a byte": ["Multiline", ["bits_per_byte/.*"]],
        "forgotten since the start of the stage, bits a byte": ["Multiline", ["forgetting/.*"]],
        "shares of the mixture": ["Multiline", ["mixture/.*"]],
    }
}
EXPERT_CHARTS = {
    "experts": {
        "busiest expert's share of a step's tokens, by layer": ["Multiline", ["train/moe/.*/max_load"]],
        "busiest expert's share of held-out tokens": ["Multiline", ["routing/max_load/.*"]],
        "choices as at the start of the stage": ["Multiline", ["routing/saturation_start/.*"]],
    }
}


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps behind `step`, and a line that a crash cut off: they will be written again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_bytes(path, "".join(f"{line}\n" for line in kept).encode())


class Metrics(Quiet):
    """Writes ``metrics.jsonl`` and the TensorBoard log of a run; only the first rank writes.

    Attributes:
        latest: the last line of training metrics.
        entry: bits a byte of each held-out stream at the start of the stage.
    """

    name = "metrics"

    def __init__(self) -> None:
        self.file: FileIO | None = None
        self.board: SummaryWriter | None = None
        self.latest: dict[str, Any] = {}
        self.entry: dict[str, float] = {}
        self.older: set[str] = set()
        self.since: tuple[float, int] = (0.0, 0)
        self.read: tuple[int, ...] = ()

    def on_start(self, run: Run) -> None:
        """Open the files, behind the last step that the run is resumed from."""
        self.every = run.config.log.every.steps(run.config.stage.tokens, run.config.tokens_per_step)
        self.since, self.read = (run.seconds, run.tokens), _samples(run)
        self.older = _older(run)
        if not is_first_rank():
            return
        path = run.config.run / METRICS
        with _explained(path):
            forget_after(path, run.step or -1)  # at step 0 even the first evaluation comes again
            self.file = run.closing.enter_context(path.open("ab", buffering=0))
        if run.config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run.config.run / "tensorboard"), purge_step=run.step + 1)
            self.board.add_custom_scalars(CHARTS if run.config.model.moe is None else {**CHARTS, **EXPERT_CHARTS})
            run.closing.callback(self.board.close)

    def on_step(self, run: Run, report: StepReport) -> None:
        """Write a line when it is due."""
        if not due(run.step, self.every, run.done):
            return
        then, before = self.since
        self.since = (run.seconds, run.tokens)
        self.latest = {
            "kind": "train",
            "step": run.step,
            "tokens": run.tokens,
            "lineage_tokens": run.lineage_tokens,
            "loss": report.loss,
            "rate": run.rate(run.step),
            "grad_norm": report.grad_norm,
            "tokens_per_second": (run.tokens - before) / max(run.seconds - then, 1e-9),
            "skipped": report.skipped,
            "seconds": run.seconds,
            **report.statistics,
        }
        self.write(self.latest)
        if self.board is not None:
            for key in ("loss", "rate", "grad_norm", "tokens_per_second", *report.statistics):
                self.board.add_scalar(f"train/{key}", self.latest[key], run.step)
            self._mixture(run, self.board)

    def _mixture(self, run: Run, board: SummaryWriter) -> None:
        """The share of each source among the samples since the line before."""
        earlier, self.read = self.read, _samples(run)
        read = [now - then for now, then in zip(self.read, earlier, strict=True)]
        for source, count in zip(run.start.stage.plan.sources, read, strict=True):
            board.add_scalar(f"mixture/{source.name}", count / max(sum(read), 1), run.step)

    def evaluation(self, run: Run, results: list[StreamLoss]) -> None:
        """Write the losses of held-out streams, and what was forgotten since the start of the stage."""
        if run.step == 0:
            self.entry = {result.stream: result.bits_per_byte for result in results}
        for result in results:
            self.write(
                {
                    "kind": "eval",
                    "step": run.step,
                    "tokens": run.tokens,
                    "lineage_tokens": run.lineage_tokens,
                    "stream": result.stream,
                    "loss": result.loss,
                    "bits_per_byte": result.bits_per_byte,
                }
            )
            if self.board is not None:
                self.board.add_scalar(f"bits_per_byte/{result.stream}", result.bits_per_byte, run.step)
        if self.board is not None:
            self._forgetting(run, results, self.board)

    def _forgetting(self, run: Run, results: list[StreamLoss], board: SummaryWriter) -> None:
        """The change of each older stream since the start of the stage, and the mean and the largest one."""
        known = [result for result in results if result.stream in self.older & self.entry.keys()]
        lost = {result.stream: result.bits_per_byte - self.entry[result.stream] for result in known}
        for stream, change in lost.items():
            board.add_scalar(f"forgetting/{stream}", change, run.step)
        if lost:
            board.add_scalar("forgetting_of_all/mean", sum(lost.values()) / len(lost), run.step)
            board.add_scalar("forgetting_of_all/max", max(lost.values()), run.step)

    def state(self) -> dict[str, Any]:
        """Keep the losses at the start of the stage: forgetting is measured from there."""
        return {"entry": self.entry}

    def load(self, state: dict[str, Any]) -> None:
        """Take over the losses at the start of the stage."""
        self.entry = {stream: float(loss) for stream, loss in state.get("entry", {}).items()}

    def write(self, line: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            SetupError: if the disk is full or fails.
        """
        if self.file is not None:
            with _explained(Path(self.file.name)):
                text = f"{json.dumps(line)}\n".encode()
                if self.file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _samples(run: Run) -> tuple[int, ...]:
    """Samples of each source so far."""
    return tuple(run.data.counts(run.step * run.config.batch.sequences))


def _older(run: Run) -> set[str]:
    """Names of the streams that the lineage was trained on before the stage, also those of replay from outside."""
    earlier = {source.name for stage in run.start.stages[:-1] for source in stage.plan.sources if source.role == "new"}
    outside = {source.name for source in run.start.stage.plan.sources if source.policy == "external"}
    return earlier | {name.removeprefix("replay-") for name in outside}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn a failure of the disk into an error that names the file."""
    try:
        yield
    except OSError as error:
        raise SetupError(
            f"{path} cannot be written: {disk_full(error) or error.strerror}. The checkpoints are untouched; "
            "make room, and run the same command again"
        ) from error
