"""What the train loop knows of an engine: one optimizer step, evaluation, state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megacpt.optim.moments import Carry


class Batch(NamedTuple):
    """A microbatch of one data-parallel rank.

    Attributes:
        tokens: [b, L + 1], ids; the model predicts ``tokens[:, 1:]`` from ``tokens[:, :-1]``.
        valid: [b, L], which predictions count; None for all.
    """

    tokens: NDArray[np.int64]
    valid: NDArray[np.bool_] | None = None


class Predictions(NamedTuple):
    """How well each token of some microbatches was predicted.

    The rows are the sequences of all data-parallel ranks: those of the first rank's first microbatch, of the second
    rank's first microbatch, and so on, then those of the second microbatches.

    Attributes:
        nats: [n, L] float32, the loss of each prediction.
        hits: [n, L] bool, whether the target was the likeliest token (of equally likely ones, the lowest id counts).
    """

    nats: NDArray[np.float32]
    hits: NDArray[np.bool_]


class Choices(NamedTuple):
    """Which experts the tokens of some microbatches go to.

    Attributes:
        experts: [m, n, L, k] int16, for each layer with experts, in the order of the model; -1 for a dropped choice.
            Rows n as in `Predictions`.
        layers: [m], the numbers of these layers in the model, from 1.
    """

    experts: NDArray[np.int16]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    Attributes:
        loss: nats a valid token, over the global batch.
        tokens: valid tokens of the global batch.
        grad_norm: L2 norm of the gradient before clipping.
        skipped: the gradient was not finite, and the step left the weights as they were.
        statistics: further scalars (routers, quantisers).
    """

    loss: float
    tokens: int
    grad_norm: float
    skipped: bool
    statistics: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """Turns samples into optimizer steps under some parallel layout."""

    @property
    def data_rank(self) -> int:
        """This rank's place on the data axis."""

    @property
    def data_size(self) -> int:
        """The number of data-parallel ranks."""

    @property
    def microbatch_multiple(self) -> int:
        """The number of microbatches of a call has to be a multiple of this."""

    def train_step(self, batches: Sequence[Batch], rate: float, weight_decay: float) -> StepReport:
        """Accumulate the gradient of `batches` over all ranks and update the weights once.

        Args:
            batches: this data-parallel rank's microbatches; as many on every rank.
            rate: learning rate of the step.
            weight_decay: decay rate of the step, multiplied by `rate`.
        """

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Return the summed loss in nats and the number of valid tokens over all ranks."""

    def predict(self, batches: Sequence[Batch]) -> Predictions:
        """Return how well each token is predicted, over all ranks and on every rank; `Batch.valid` is not looked at."""

    def choices(self, batches: Sequence[Batch]) -> Choices | None:
        """Return which experts each token goes to in evaluation, over all ranks and on every rank; None without any."""

    def state(self) -> dict[str, Any]:
        """Describe the weights and the optimizer's state as parts of global tensors, for saving or loading into."""

    def load(self, state: dict[str, Any]) -> None:
        """Take over what was loaded into the tensors of `state`; means of the optimizer that lack in it begin anew."""

    def carry(self, carries: dict[str, Carry]) -> None:
        """Do to the optimizer's running means, by name, what a boundary asks for."""
