"""From the sections `schedule` and `optim` of a run file to a resolved `Schedule`."""

from __future__ import annotations

from megacpt.config import Duration, OptimConfig, Rate, ScheduleConfig
from megacpt.config.schedule import (
    AnnealSchedule,
    ConstantSchedule,
    InfiniteSchedule,
    TrilmSchedule,
    WsdSchedule,
    WsdSSchedule,
)
from megacpt.errors import ConfigError
from megacpt.optim.pieces import NEVER_ZERO, Shape
from megacpt.optim.schedules import Schedule


def stage_peak(optim: OptimConfig, stage: int) -> float:
    """The peak rate of stage `stage` of a lineage, counted from 0: `optim.peak_lr` under `peak_decay` or `peaks`.

    Raises:
        ConfigError: `optim.peaks` names no rate for this stage.
    """
    if optim.peaks is None:
        return optim.peak_lr * optim.peak_decay**stage
    if stage >= len(optim.peaks):
        raise ConfigError(
            f"optim.peaks: {len(optim.peaks)} rates, and this is stage {stage + 1} of the lineage; add the rates of "
            "the later stages, or remove the key"
        )
    return optim.peaks[stage].value(optim.peak_lr)


def build_schedule(
    cfg: ScheduleConfig, peak_lr: float, stage_tokens: int, tokens_per_step: int, offset: int = 0
) -> Schedule:
    """Resolve a schedule of a run file to tokens and absolute rates.

    Args:
        cfg: the section `schedule`.
        peak_lr: peak rate of the stage (see `stage_peak`), to which relative rates refer.
        stage_tokens: tokens of the stage, to which percentages refer.
        tokens_per_step: tokens of one optimizer step, for durations in steps.
        offset: tokens spent on this schedule by earlier stages.

    Raises:
        ConfigError: the phases don't fit the stage, or the rates are in the wrong order; names the key.
    """

    def tokens(length: Duration) -> int:
        return length.tokens(stage_tokens, tokens_per_step)

    start = offset if isinstance(cfg, AnnealSchedule) else 0
    drop, drop_to = _drop(cfg, peak_lr)
    until: Duration | None = getattr(cfg, "weight_decay_until", None)
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
        sampling=_sampling(cfg, stage_tokens, tokens_per_step),
        drop=None if drop is None else start + tokens(drop),
        drop_to=drop_to,
        weight_decay_until=None if until is None else start + tokens(until),
        releases=_releases(cfg, stage_tokens, tokens_per_step),
    )
    _check_rates(schedule)
    _check_lengths(schedule)
    return schedule


def _shape(cfg: ScheduleConfig) -> Shape:
    if isinstance(cfg, InfiniteSchedule):
        return cfg.cooldown_shape
    if isinstance(cfg, WsdSchedule | WsdSSchedule):
        return cfg.decay_shape
    if isinstance(cfg, AnnealSchedule):
        return cfg.shape
    if cfg.kind == "rex":
        return "rex"
    return "linear" if cfg.kind in ("constant", "linear", "trilm") else "cosine"


def _drop(cfg: ScheduleConfig, peak: float) -> tuple[Duration | None, float]:
    """Where the decay goes over to a lower curve, and the part of the first rate at which that one starts."""
    if isinstance(cfg, TrilmSchedule):
        return cfg.second_from, _second(cfg.second_lr, peak) / peak
    if isinstance(cfg, AnnealSchedule):
        return cfg.drop, float(cfg.drop_to)
    return None, 1.0


def _second(rate: Rate, peak: float) -> float:
    second = rate.value(peak)
    if second > peak:
        raise ConfigError(f"schedule.second_lr: {second:g} is above the peak {peak:g}; take less, or a percentage")
    return second


def _sampling(cfg: ScheduleConfig, stage_tokens: int, tokens_per_step: int) -> int:
    every: Duration | None = getattr(cfg, "sampling", None)
    if every is None:
        return 0
    tokens = every.tokens(stage_tokens, tokens_per_step)
    # Read at every step, a profile needs no grid: it is the curve itself at the end of the step.
    return tokens if tokens > tokens_per_step else 0


def _releases(cfg: ScheduleConfig, stage_tokens: int, tokens_per_step: int) -> tuple[tuple[int, int], ...]:
    if not isinstance(cfg, WsdSSchedule):
        return ()
    try:
        return cfg.decays(stage_tokens, tokens_per_step)
    except ValueError as error:
        raise ConfigError(f"schedule.releases: {error}") from error


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
    if schedule.drop_to * schedule.peak < schedule.minimum and schedule.kind == "trilm":
        raise ConfigError(
            f"schedule.second_lr: {schedule.drop_to * schedule.peak:g} is below schedule.min_lr {schedule.minimum:g}"
        )
    if schedule.shape in NEVER_ZERO and schedule.minimum == 0:
        name = "an exponential" if schedule.shape == "exponential" else "a reciprocal"
        raise ConfigError(f"schedule.min_lr: {name} decay never reaches 0; give a rate above 0, or take another shape")


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
