"""When held-out streams are measured: closely after a boundary, where a model forgets most, then at an even pace."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """The steps of a stage at which held-out streams are measured; step 0 is before the first.

    These are steps 0, ``every``, ``2 * every`` and so on, the last, and steps 1, 2, 4, 8 and so on up to `dense`. It
    depends on the step alone, so that a resumed run measures at the same steps as one that was never stopped.

    Args:
        every: steps between two measurements.
        last: the last step of the stage.
        dense: up to this step the powers of two are measured too; 0 for none.
    """

    every: int
    last: int
    dense: int = 0

    def __contains__(self, step: int) -> bool:
        """Whether the streams are measured after `step`."""
        return step in (0, self.last) or step % self.every == 0 or (step <= self.dense and step & (step - 1) == 0)
