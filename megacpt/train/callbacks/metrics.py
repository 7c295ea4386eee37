"""Metrics as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacpt.data.files import write_bytes
from megacpt.engine.protocol import StepReport
from megacpt.evaluate.loss import StreamLoss
from megacpt.runtime.layout import is_first_rank
from megacpt.train.callbacks import Quiet, due
from megacpt.train.loop import Run

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps behind `step`, and a line that a crash cut off: they will be written again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
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
    """

    name = "metrics"

    def __init__(self) -> None:
        self.file: TextIOWrapper | None = None
        self.board: SummaryWriter | None = None
        self.latest: dict[str, Any] = {}
        self.since: tuple[float, int] = (0.0, 0)

    def on_start(self, run: Run) -> None:
        """Open the files, behind the last step that the run is resumed from."""
        self.every = run.config.log.every.steps(run.config.stage.tokens, run.config.tokens_per_step)
        self.since = (run.seconds, run.tokens)
        if not is_first_rank():
            return
        path = run.config.run / METRICS
        forget_after(path, run.step or -1)  # at step 0 even the first evaluation comes again
        self.file = path.open("a")
        if run.config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run.config.run / "tensorboard"), purge_step=run.step + 1)

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

    def evaluation(self, run: Run, results: list[StreamLoss]) -> None:
        """Write the losses of held-out streams."""
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

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def on_end(self, run: Run) -> None:  # noqa: ARG002
        """Close the files."""
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()
