"""What happens beside training: metrics, progress, evaluation, checkpoints, health, signals."""

from __future__ import annotations

from typing import Any

from megacpt.engine.protocol import StepReport
from megacpt.train.loop import Run


class Quiet:
    """A callback that does nothing; the others override what they need."""

    name = "quiet"

    def on_start(self, run: Run) -> None:
        """Do nothing."""

    def on_step(self, run: Run, report: StepReport) -> None:
        """Do nothing."""

    def on_end(self, run: Run) -> None:
        """Do nothing."""

    def state(self) -> dict[str, Any]:
        """Keep nothing."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take over nothing."""


def due(step: int, every: int, last: bool = False) -> bool:
    """Whether something that happens every `every` steps happens after `step`."""
    return last or step % every == 0
