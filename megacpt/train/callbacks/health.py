"""Stopping when asked to, and when training has gone wrong."""

from __future__ import annotations

import math
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megacpt.engine.protocol import StepReport
from megacpt.errors import MegacptError
from megacpt.runtime.device import local_device
from megacpt.train.callbacks import Quiet
from megacpt.train.loop import Run

PATIENCE = 10


class TrainingError(MegacptError):
    """Training no longer makes progress."""

    exit_code = 1


class Health(Quiet):
    """Ends a run whose gradients stay non-finite; the last checkpoint is the last good one."""

    name = "health"

    def __init__(self) -> None:
        self.bad = 0

    def on_step(self, run: Run, report: StepReport) -> None:
        """Count bad steps in a row."""
        self.bad = self.bad + 1 if report.skipped or not math.isfinite(report.loss) else 0
        if self.bad >= PATIENCE:
            raise TrainingError(
                f"the gradient was not finite in {PATIENCE} steps in a row (up to step {run.step}); none of them "
                "changed the weights. Lower optim.peak_lr, or look at the samples of these steps"
            )

    def state(self) -> dict[str, Any]:
        """Keep the count."""
        return {"bad": self.bad}

    def load(self, state: dict[str, Any]) -> None:
        """Take over the count."""
        self.bad = int(state.get("bad", 0))


class Signals(Quiet):
    """On SIGTERM or SIGINT, finishes the step, saves, and stops; the ranks agree on the step."""

    name = "signals"

    def __init__(self) -> None:
        self.asked = False

    def on_start(self, run: Run) -> None:
        """Listen, until the session ends."""
        for number in (signal.SIGTERM, signal.SIGINT):
            run.closing.callback(signal.signal, number, signal.signal(number, self._ask))

    def _ask(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the checkpoint
        self.asked = True

    def on_step(self, run: Run, report: StepReport) -> None:  # noqa: ARG002
        """Stop all ranks when one was asked to."""
        asked = self.asked
        if dist.get_world_size() > 1:
            flag = torch.tensor(int(asked), device=local_device())
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            asked = bool(flag)
        run.stopping = run.stopping or (asked and not run.done)
