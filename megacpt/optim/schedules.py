"""Learning-rate schedules: pure functions of the tokens consumed.

Every schedule is a chain of pieces, each a curve between two rates over a stretch of tokens (`Schedule.pieces`).
Sources: Ibrahim et al. 2024 (arXiv 2403.08763), eq. 1 (linear warmup) and eq. 2 (cosine); Singh et al. 2025
(arXiv 2503.02844), eq. 1 (infinite schedule: cooldown, constant, exponential annealing); Hägele et al. 2024
(arXiv 2405.18392) for the decay shapes of WSD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from megacpt.config import (
    AnnealSchedule,
    ConstantSchedule,
    Duration,
    InfiniteSchedule,
    ScheduleConfig,
    WsdSchedule,
)
from megacpt.errors import CheckpointError, ConfigError, nearest

Kind = Literal["constant", "linear", "cosine", "wsd", "infinite", "rewarmed_cosine", "anneal"]
Phase = Literal["warmup", "cooldown", "constant", "decay", "done"]
Shape = Literal["linear", "cosine", "exponential", "sqrt", "inverse_sqrt"]

_KINDS: tuple[Kind, ...] = ("constant", "linear", "cosine", "wsd", "infinite", "rewarmed_cosine", "anneal")


# The share of the difference between both rates that is gone at progress p, 0 < p < 1.
_SHARES: dict[Shape, Callable[[float], float]] = {
    "linear": lambda p: p,
    "cosine": lambda p: 0.5 * (1.0 - math.cos(math.pi * p)),
    "sqrt": math.sqrt,
}


@dataclass(frozen=True)
class Piece:
    """One curve: from rate `first` at token `start` to rate `last` at token `stop` (None: `first` for ever)."""

    phase: Phase
    start: int
    stop: int | None
    first: float
    last: float
    shape: Shape = "linear"
    alpha: float = 10.0

    def rate(self, token: int) -> float:
        """The rate at `token`; exactly `first` up to `start`, and exactly `last` from `stop` on."""
        if self.stop is None or token <= self.start or self.first == self.last:
            return self.first
        if token >= self.stop:
            return self.last
        progress = (token - self.start) / (self.stop - self.start)
        if self.shape == "exponential":
            value = self.first * math.pow(self.last / self.first, progress)
        elif self.shape == "inverse_sqrt":
            value = self.first + (self.last - self.first) * self._h(progress) / self._h(1.0)
        else:
            value = self.first + (self.last - self.first) * _SHARES[self.shape](progress)
        low, high = sorted((self.first, self.last))
        return min(max(value, low), high)  # rounding must not step outside the two ends

    def _h(self, progress: float) -> float:
        """Singh et al. (2025): h(p) = 1/sqrt(1 + alpha p) - 1."""
        return 1.0 / math.sqrt(1.0 + self.alpha * progress) - 1.0


@dataclass(frozen=True)
class Schedule:
    """A resolved schedule: positions in tokens, rates absolute. Immutable, and saved by value in the ledger.

    Tokens are counted from the start of the schedule: `offset` tokens were spent on it by earlier stages. A stage
    that goes on with its parent's schedule takes ``dataclasses.replace(schedule, offset=offset + spent)``.

    Attributes:
        kind: the name in the run file.
        peak: highest rate, at the end of the warmup.
        minimum: rate at the end of the decay.
        constant: rate of the constant phase (`infinite`; elsewhere the peak).
        warmup: token at which the warmup ends.
        cooldown: token at which the cooldown ends (`infinite`); a cumulative end point, not a length.
        decay: length of the decay in tokens (`wsd`).
        shape: curve of the cooldown or of the decay.
        alpha: steepness of `inverse_sqrt`.
        horizon: tokens of the stage it was built for; taken where `rate` gets no `stage_tokens`.
        offset: tokens that earlier stages spent on this schedule.
    """

    kind: Kind
    peak: float
    minimum: float
    constant: float
    warmup: int
    cooldown: int
    decay: int
    shape: Shape
    alpha: float
    horizon: int
    offset: int = 0

    @property
    def horizon_free(self) -> bool:
        """Whether the length of the stage has no influence: appending data then never changes the past."""
        return self.kind in ("constant", "infinite") or (self.kind == "wsd" and self.decay == 0)

    def rate(self, tokens_into_stage: int, stage_tokens: int | None = None, entry_rate: float | None = None) -> float:
        """The learning rate after `tokens_into_stage` tokens of a stage.

        Args:
            tokens_into_stage: tokens of this stage consumed so far. At 0 a warmup gives 0 (Ibrahim et al. 2024,
                eq. 1); a loop that wants no idle step asks with the tokens at the end of its step.
            stage_tokens: length of the stage; None takes the length that the schedule was built for.
            entry_rate: rate at which the parent stage stopped; `anneal` and `rewarmed_cosine` start there.

        Raises:
            ConfigError: `entry_rate` is missing or impossible for this kind.
        """
        token = self.offset + tokens_into_stage
        pieces = self.pieces(stage_tokens, entry_rate)
        return next((p for p in pieces if p.stop is None or token < p.stop), pieces[-1]).rate(token)

    def phase(self, tokens_into_stage: int, stage_tokens: int | None = None, entry_rate: float | None = None) -> Phase:
        """The phase at the point where `rate` is asked; done means that the decay is over."""
        token = self.offset + tokens_into_stage
        pieces = self.pieces(stage_tokens, entry_rate)
        return next((p.phase for p in pieces if p.stop is None or token < p.stop), "done")

    def pieces(self, stage_tokens: int | None = None, entry_rate: float | None = None) -> tuple[Piece, ...]:
        """The chain of curves without gaps, in tokens from the start of the schedule; empty ones are left out."""
        end = self.offset + (self.horizon if stage_tokens is None else stage_tokens)
        chain = self._chain(end, entry_rate)
        kept = tuple(piece for piece in chain if piece.stop is None or piece.stop > piece.start)
        return kept or chain[-1:]

    def _chain(self, end: int, entry_rate: float | None) -> tuple[Piece, ...]:
        if self.kind == "anneal":
            return (Piece("decay", self.offset, end, self._entry(entry_rate), self.minimum, self.shape),)
        first = self._entry(entry_rate) if self.kind == "rewarmed_cosine" else 0.0
        warmup = Piece("warmup", 0, self.warmup, first, self.peak)
        if self.kind == "constant":
            return (warmup, Piece("constant", self.warmup, None, self.peak, self.peak))
        if self.kind == "infinite":
            cooldown = Piece("cooldown", self.warmup, self.cooldown, self.peak, self.constant, self.shape, self.alpha)
            return (warmup, cooldown, Piece("constant", self.cooldown, None, self.constant, self.constant))
        if self.kind == "wsd":
            if self.decay == 0:
                return (warmup, Piece("constant", self.warmup, None, self.peak, self.peak))
            turn = max(self.warmup, end - self.decay)
            stable = Piece("constant", self.warmup, turn, self.peak, self.peak)
            return (warmup, stable, Piece("decay", turn, end, self.peak, self.minimum, self.shape))
        return (warmup, Piece("decay", self.warmup, end, self.peak, self.minimum, self.shape))

    def _entry(self, entry_rate: float | None) -> float:
        if entry_rate is None:
            raise ConfigError(
                f"schedule.kind: {self.kind} starts at the rate where an earlier stage stopped, and there is "
                "none; use it to continue or anneal a checkpoint, or choose another kind for a first stage"
            )
        if self.kind == "anneal" and entry_rate < self.minimum:
            raise ConfigError(
                f"schedule.min_lr: {self.minimum:g} is above the rate {entry_rate:g} at which the parent stopped, "
                "so there is nothing to anneal; lower min_lr, or start from the trunk and not from a checkpoint "
                "that is annealed already"
            )
        if self.kind == "rewarmed_cosine" and entry_rate > self.peak:
            raise ConfigError(
                f"optim.peak_lr: {self.peak:g} is below the rate {entry_rate:g} at which the parent stopped, so "
                "there is nothing to re-warm; raise peak_lr, or choose kind: cosine with warmup: 0%"
            )
        return entry_rate

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy by value; `schedule_from_dict` gives an equal schedule back, to the last bit."""
        return asdict(self)


def schedule_from_dict(saved: Mapping[str, Any]) -> Schedule:
    """Rebuild a schedule from `Schedule.to_dict`.

    Raises:
        CheckpointError: a field is missing, unknown or of a kind that this version doesn't know.
    """
    known = {field.name for field in fields(Schedule)}
    if wrong := sorted(known ^ set(saved)):
        raise CheckpointError(f"the saved schedule misses, or has beyond this version's, the fields {', '.join(wrong)}")
    kind = saved["kind"]
    if kind not in _KINDS:
        raise CheckpointError(f"unknown kind of schedule '{kind}' in the checkpoint{nearest(kind, _KINDS)}")
    return Schedule(**saved)


def build_schedule(
    cfg: ScheduleConfig, peak_lr: float, stage_tokens: int, tokens_per_step: int, offset: int = 0
) -> Schedule:
    """Resolve a schedule of a run file to tokens and absolute rates.

    Args:
        cfg: the section `schedule`.
        peak_lr: `optim.peak_lr`, to which relative rates refer.
        stage_tokens: tokens of the stage, to which percentages refer.
        tokens_per_step: tokens of one optimizer step, for durations in steps.
        offset: tokens spent on this schedule by earlier stages.

    Raises:
        ConfigError: the phases don't fit the stage, or the rates are in the wrong order; names the key.
    """

    def tokens(length: Duration) -> int:
        return length.tokens(stage_tokens, tokens_per_step)

    schedule = Schedule(
        kind=cfg.kind,
        peak=peak_lr,
        minimum=peak_lr if isinstance(cfg, ConstantSchedule) else cfg.min_lr.value(peak_lr),
        constant=cfg.constant_lr.value(peak_lr) if isinstance(cfg, InfiniteSchedule) else peak_lr,
        warmup=0 if isinstance(cfg, AnnealSchedule) else tokens(cfg.warmup),
        cooldown=tokens(cfg.cooldown) if isinstance(cfg, InfiniteSchedule) else 0,
        decay=tokens(cfg.decay) if isinstance(cfg, WsdSchedule) else 0,
        shape=_shape(cfg),
        alpha=cfg.timescale if isinstance(cfg, InfiniteSchedule) else 10.0,
        horizon=stage_tokens,
        offset=offset,
    )
    _check_rates(schedule)
    _check_lengths(schedule)
    return schedule


def _shape(cfg: ScheduleConfig) -> Shape:
    if isinstance(cfg, InfiniteSchedule):
        return cfg.cooldown_shape
    if isinstance(cfg, WsdSchedule):
        return cfg.decay_shape
    if isinstance(cfg, AnnealSchedule):
        return cfg.shape
    return "linear" if cfg.kind in ("constant", "linear") else "cosine"


def _check_rates(schedule: Schedule) -> None:
    if schedule.peak <= 0:
        raise ConfigError(f"optim.peak_lr: {schedule.peak:g} must be above 0")
    if schedule.minimum > schedule.peak:
        raise ConfigError(f"schedule.min_lr: {schedule.minimum:g} is above optim.peak_lr {schedule.peak:g}")
    if not schedule.minimum <= schedule.constant <= schedule.peak:
        raise ConfigError(
            f"schedule.constant_lr: {schedule.constant:g} must lie between schedule.min_lr {schedule.minimum:g} "
            f"and optim.peak_lr {schedule.peak:g}"
        )
    if schedule.shape == "exponential" and schedule.minimum == 0:
        raise ConfigError(
            "schedule.min_lr: an exponential decay never reaches 0; give a rate above 0, or take another shape"
        )


def _check_lengths(schedule: Schedule) -> None:
    if schedule.kind == "infinite" and schedule.cooldown < schedule.warmup:
        raise ConfigError(
            f"schedule.cooldown: the cooldown would end at token {schedule.cooldown:,}, before the warmup ends "
            f"at {schedule.warmup:,}; both count from the start of the stage"
        )
    if schedule.horizon_free:
        return
    end = schedule.offset + schedule.horizon
    if schedule.warmup + schedule.decay > end:
        tail = f" and a decay of {schedule.decay:,}" if schedule.decay else ""
        raise ConfigError(
            f"schedule.warmup: a warmup of {schedule.warmup:,} tokens{tail} doesn't fit a stage of {end:,} "
            "tokens; shorten it, or lengthen stage.tokens"
        )
