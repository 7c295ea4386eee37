"""Learning-rate schedules: pure functions of the tokens consumed.

Every schedule is a chain of pieces, each a curve between two rates over a stretch of tokens (`Schedule.pieces`).
Sources: Ibrahim et al. 2024 (arXiv 2403.08763), eq. 1 (linear warmup) and eq. 2 (cosine); Singh et al. 2025
(arXiv 2503.02844), eq. 1 (infinite schedule: cooldown, constant, exponential annealing); Wen et al. 2024
(arXiv 2410.05192) for WSD-S; Kaushal et al. 2024 (Spectra, arXiv 2407.12327) for the two steps of TriLM. The profiles
have theirs in `megacpt.optim.pieces`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, get_args

from megacpt.errors import CheckpointError, ConfigError, nearest
from megacpt.optim.pieces import Phase, Piece, Shape

Kind = Literal["constant", "linear", "cosine", "rex", "trilm", "wsd", "wsd_s", "infinite", "rewarmed_cosine", "anneal"]

_KINDS: tuple[Kind, ...] = get_args(Kind)


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
        shape: profile of the cooldown or of the decay.
        alpha: steepness of `inverse_sqrt`.
        horizon: tokens of the stage it was built for; taken where `rate` gets no `stage_tokens`.
        offset: tokens that earlier stages spent on this schedule.
        sampling: the profile is read every so many tokens from the start of its piece; 0: everywhere. The warmup is
            never sampled.
        drop: token at which the decay goes over to a lower curve (`trilm`, `anneal`); None: it doesn't.
        drop_to: the rate at which that curve starts, as a part of the one at which the first starts.
        weight_decay_until: token at which the weight decay ends; None: never.
        releases: token at which each decay starts and ends (`wsd_s`); after each the rate is back at the peak.
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
    sampling: int = 0
    drop: int | None = None
    drop_to: float = 1.0
    weight_decay_until: int | None = None
    releases: tuple[tuple[int, int], ...] = ()

    @property
    def horizon_free(self) -> bool:
        """Whether the length of the stage has no influence: appending data then never changes the past."""
        return self.kind in ("constant", "infinite", "wsd_s") or (self.kind == "wsd" and self.decay == 0)

    def rate(self, tokens_into_stage: int, stage_tokens: int | None = None, entry_rate: float | None = None) -> float:
        """The learning rate of the step that ends after `tokens_into_stage` tokens of a stage.

        Where the rate jumps (`wsd_s`, `trilm`, sampled profiles) the token at the jump has the rate from before it.

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
        return next((p for p in pieces if p.upper is None or token <= p.upper), pieces[-1]).rate(token)

    def phase(self, tokens_into_stage: int, stage_tokens: int | None = None, entry_rate: float | None = None) -> Phase:
        """The phase that begins or goes on at this point; done means that a decay has just ended, or is over."""
        token = self.offset + tokens_into_stage
        pieces = self.pieces(stage_tokens, entry_rate)
        if any(p.phase == "decay" and p.stop == token for p in pieces):
            return "done"
        return next((p.phase for p in pieces if p.upper is None or token < p.upper), "done")

    def weight_decay(self, base: float, tokens_into_stage: int) -> float:
        """The weight decay of the step that ends after `tokens_into_stage` tokens: `base`, then 0.

        Kaushal et al. (2024) take it away after two thirds of the training of ternary models.
        """
        until = self.weight_decay_until
        return base if until is None or self.offset + tokens_into_stage <= until else 0.0

    def pieces(self, stage_tokens: int | None = None, entry_rate: float | None = None) -> tuple[Piece, ...]:
        """The chain of curves without gaps, in tokens from the start of the schedule; empty ones are left out."""
        end = self.offset + (self.horizon if stage_tokens is None else stage_tokens)
        chain = tuple(self._chain(end, entry_rate))
        kept = tuple(piece for piece in chain if piece.upper is None or piece.upper > piece.lower)
        return kept or chain[-1:]

    def _chain(self, end: int, entry_rate: float | None) -> Iterator[Piece]:
        if self.kind == "anneal":
            yield from self._decay(self.offset, end, self._entry(entry_rate))
            return
        first = self._entry(entry_rate) if self.kind == "rewarmed_cosine" else 0.0
        yield Piece("warmup", 0, self.warmup, first, self.peak)
        if self.kind == "infinite":
            yield Piece(
                "cooldown", self.warmup, self.cooldown, self.peak, self.constant, self.shape, self.alpha, self.sampling
            )
            yield self._stable(self.cooldown, None, self.constant)
        elif self.horizon_free:
            start = self.warmup
            for turn, stop in self.releases:
                yield self._stable(start, turn, self.peak)
                yield from self._decay(turn, stop, self.peak)
                start = stop
            yield self._stable(start, None, self.peak)
        elif self.kind == "wsd":
            turn = max(self.warmup, end - self.decay)
            yield self._stable(self.warmup, turn, self.peak)
            yield from self._decay(turn, end, self.peak)
        else:
            yield from self._decay(self.warmup, end, self.peak)

    def _stable(self, start: int, stop: int | None, rate: float) -> Piece:
        return Piece("constant", start, stop, rate, rate)

    def _decay(self, start: int, stop: int, first: float) -> Iterator[Piece]:
        """From `first` down to the minimum; with a drop, two curves over the same stretch that share their end."""
        drop = self.drop if self.drop is not None and start < self.drop < stop else None
        yield Piece("decay", start, stop, first, self.minimum, self.shape, sampling=self.sampling, end=drop)
        if drop is not None:
            lower = max(first * self.drop_to, self.minimum)
            yield Piece("decay", start, stop, lower, self.minimum, self.shape, sampling=self.sampling, begin=drop)

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
        return {**asdict(self), "releases": [list(release) for release in self.releases]}


def schedule_from_dict(saved: Mapping[str, Any]) -> Schedule:
    """Rebuild a schedule from `Schedule.to_dict`; one from before a field with a default existed has that default.

    Raises:
        CheckpointError: a field is missing, unknown or of a kind that this version doesn't know.
    """
    known = {field.name for field in fields(Schedule)}
    required = {field.name for field in fields(Schedule) if field.default is MISSING}
    if wrong := sorted((required - set(saved)) | (set(saved) - known)):
        raise CheckpointError(f"the saved schedule misses, or has beyond this version's, the fields {', '.join(wrong)}")
    kind = saved["kind"]
    if kind not in _KINDS:
        raise CheckpointError(f"unknown kind of schedule '{kind}' in the checkpoint{nearest(kind, _KINDS)}")
    return Schedule(**{**saved, "releases": tuple((turn, stop) for turn, stop in saved.get("releases", ()))})
