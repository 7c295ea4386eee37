"""Controllers of the mixture: what the evaluations of a stage make of its share of replay.

A controller is a pure function of its state and of what was measured; the state is in the ledger, as plain values for
JSON. A decision holds from the next step on, as a phase of the plan. So a run that is killed and started again
decides as one that was not. Losses are rounded to 1e-3 bits a byte, far above what layouts differ by, before
anything follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megacpt.config import RetentionConfig, RunConfig

DIGITS = 3
State = Mapping[str, Any]


class Controller(Protocol):
    """Decides how much is replayed. The key ``share`` of its state is the share of replay from now on."""

    def begin(self, share: float, losses: Mapping[str, float]) -> State:
        """Return the state at the start of a stage.

        Args:
            share: the share of replay that the stage begins with.
            losses: bits a byte of held-out streams that the stage does not train on.
        """

    def decide(self, state: State, step: int, losses: Mapping[str, float]) -> State:
        """Return the state after an evaluation behind optimizer step `step`; arguments as `begin`."""


@dataclass(frozen=True)
class Retention:
    """Replays as much as it takes to keep what earlier stages learned.

    The share of replay goes up by `step` where the losses have risen by more than `target` on the mean since the start
    of the stage, and down where by less than half of that; it stays within `lowest` and `highest`. Losses that are no
    numbers decide nothing.
    """

    target: float
    step: float
    lowest: float
    highest: float

    def begin(self, share: float, losses: Mapping[str, float]) -> State:
        """Remember the losses at the start of the stage."""
        reference = {name: round(loss, DIGITS) for name, loss in losses.items()}
        return {"kind": "retention", "share": share, "reference": reference, "decisions": []}

    def decide(self, state: State, step: int, losses: Mapping[str, float]) -> State:
        """Move the share, and note from what: every decision is kept with its step, the mean rise and the share."""
        reference = state["reference"]
        rises = [round(losses[name], DIGITS) - reference[name] for name in reference if name in losses]
        if not rises or not all(map(math.isfinite, rises)):
            return state
        rise = round(sum(rises) / len(rises), DIGITS)
        move = self.step if rise > self.target else -self.step if rise < self.target / 2 else 0.0
        # Nine digits, so that steps there and back meet again.
        share = min(self.highest, max(self.lowest, round(state["share"] + move, 9)))
        decision = {"step": step, "rise": rise, "share": share}
        return {**state, "share": share, "decisions": [*state["decisions"], decision]}


def build_controller(settings: RetentionConfig) -> Controller:
    """Return the controller that the settings describe."""
    return Retention(settings.target, float(settings.step), float(settings.min), float(settings.max))


def watched_streams(config: RunConfig) -> list[str]:
    """Return the held-out streams that a controller goes by: those that the stage does not train on."""
    return [name for name in config.evaluate.streams if name not in config.stage.mixture]
