"""A run: everything that decides what is trained, and whether its parts agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from megacpt.config.base import Count, LocalPath, Problem, Section, raise_problems
from megacpt.config.carry import layer_range
from megacpt.config.mixture import timeline, timeline_problems
from megacpt.config.model import ModelConfig
from megacpt.config.parts import (
    BatchConfig,
    CheckpointConfig,
    EvaluateConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
)
from megacpt.config.quantise import CacheForm
from megacpt.config.quantities import Rate
from megacpt.config.schedule import (
    AnnealSchedule,
    ConstantSchedule,
    InfiniteSchedule,
    ScheduleConfig,
    TrilmSchedule,
    WsdSchedule,
    WsdSSchedule,
)
from megacpt.config.stage import StageConfig
from megacpt.config.yaml_text import short

_LEAST_GROUP = 5  # weights of a group whose sum (8 bytes) and codes are less than they are in bfloat16


class RunConfig(Section):
    """Everything that decides a run; saved in its folder as run.yaml."""

    run: LocalPath = Field(
        description="Folder of the run: run.yaml, checkpoints, metrics and logs are written there.",
        examples=["runs/english"],
    )
    seed: Count = Field(
        default=1234,
        ge=0,
        le=2**32 - 1,
        description="Seed of the initial weights and of the order of the data.",
        examples=[1234],
    )
    model: ModelConfig = Field(
        description="The network: a name from configs/models, the path of a YAML file, or the keys themselves.",
        examples=["tiny"],
    )
    tokenizer: str = Field(
        min_length=1,
        description="How text becomes tokens: `bytes` (UTF-8 bytes, no training needed), or the path of a "
        "SentencePiece model, of a Hugging Face tokenizer.json, or of a folder that holds either.",
        examples=["bytes", "tokenizers/english"],
    )
    stage: StageConfig = Field(description="What is trained on: a mixture of streams, for a number of tokens.")
    schedule: ScheduleConfig = Field(
        default_factory=InfiniteSchedule,
        description="The learning rate as a function of tokens: the keys themselves, or a name from "
        "configs/schedules or the path of a YAML file, which also set optim.peak_lr where it is not given.",
    )
    optim: OptimConfig = Field(description="The optimizer and its hyperparameters.")
    batch: BatchConfig = Field(description="How many tokens an optimizer step sees.")
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="How the model and the batch are spread over ranks."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Arithmetic of the model. bfloat16 keeps the trained weights and the optimizer in float32.",
        examples=["bfloat16"],
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Activations computed again in the backward pass instead of kept: none; selective (the "
        "attention core only); full (every layer; least memory, about a third more computation).",
        examples=["selective"],
    )
    quantised_cache: CacheForm = Field(
        default="dense",
        description="How quantised matrices are kept between microbatches: dense (in the precision of the run; "
        "fastest); fp8 (their codes in one byte) or 2bit (their codes in two bits), from which the matrix is made "
        "again for each multiplication. It changes no numbers.",
        examples=["2bit"],
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="When the run is saved, and which checkpoints stay."
    )
    evaluate: EvaluateConfig = Field(
        default_factory=EvaluateConfig, description="Loss on held-out streams during training."
    )
    log: LogConfig = Field(default_factory=LogConfig, description="What is written while training.")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees, over all ranks."""
        return self.batch.sequences * self.batch.seq_length

    @property
    def stage_steps(self) -> int:
        """Optimizer steps of the stage; the last one reaches `stage.tokens` or passes it."""
        return -(-self.stage.tokens // self.tokens_per_step)

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        found = (
            self._rate_problems,
            self._phase_problems,
            self._kind_problems,
            self._peak_problems,
            self._mixture_problems,
            self._cache_problems,
        )
        raise_problems([problem for problems in found for problem in problems()])
        return self

    def _peak_problems(self) -> Iterator[Problem]:
        """Of what `optim` says about stages and parts of the model."""
        optim, model = self.optim, self.model
        if optim.peaks is not None and optim.peak_decay != 1:
            yield Problem("optim.peak_decay", "optim.peaks names the peak of each stage already: remove one of both")
        if optim.peaks is not None and any(peak.value(optim.peak_lr) == 0 for peak in optim.peaks):
            yield Problem("optim.peaks", "a peak of 0 trains nothing: give rates above 0")
        parts = optim.multipliers
        if model.tied_embeddings and parts.output != type(parts.output)():
            text = "with model.tied_embeddings the output matrix is the embedding: set optim.multipliers.embeddings"
            yield Problem("optim.multipliers.output", text)
        yield from self._freeze_problems()
        if parts.lower_layers.layers > model.layers:
            text = f"{parts.lower_layers.layers} is more than model.layers: take at most {model.layers}"
            yield Problem("optim.multipliers.lower_layers.layers", text)

    def _freeze_problems(self) -> Iterator[Problem]:
        frozen, model = self.optim.freeze, self.model
        for part in frozen:
            if layer_range(part)[1] > model.layers:
                yield Problem("optim.freeze", f"{part} goes beyond model.layers, which is {model.layers}")
        if "output" in frozen and model.tied_embeddings:
            text = "with model.tied_embeddings the output matrix is the embedding: freeze embeddings"
            yield Problem("optim.freeze", text)
        layers = {n for part in frozen for n in range(layer_range(part)[0], layer_range(part)[1] + 1)}
        parts = {"attention"} | ({"router", "experts"} if model.moe is not None else set())
        if model.moe is None or model.moe.shared_ffn or not all(model.moe_layers):
            parts.add("mlp")
        inside = parts <= set(frozen) or layers >= set(range(1, model.layers + 1))
        outside = {"embeddings", "norms"} | (set() if model.tied_embeddings else {"output"})
        if inside and outside <= set(frozen):
            yield Problem("optim.freeze", "nothing is left to train: name fewer parts")

    def _cache_problems(self) -> Iterator[Problem]:
        quantise = self.model.quantise
        why = None if quantise is None else quantise.cache_problem(self.quantised_cache)
        if why is not None:
            yield Problem("quantised_cache", why)
        if self.parallel.gather == "2bit":
            yield from self._gather_problems()

    def _gather_problems(self) -> Iterator[Problem]:
        """Why ranks cannot send each other codes of two bits."""
        quantise = self.model.quantise
        if not self.parallel.distributed_optimizer:
            text = "2bit: only a distributed optimizer gathers weights: take full, or set "
            yield Problem("parallel.gather", f"{text}parallel.distributed_optimizer to true")
        if quantise is None:
            yield Problem("parallel.gather", "2bit is for ternary matrices, and model.quantise is not given: take full")
            return
        if quantise.grid != "ternary":
            text = f"2bit is for the grid ternary, and model.quantise.grid is {quantise.grid}: take full"
            yield Problem("parallel.gather", text)
        group = quantise.scale.group
        if group is not None and group < _LEAST_GROUP:
            text = f"2bit also moves the sums of groups, which with a model.quantise.scale.group of {group} is more "
            text += f"than the weights: take full, or groups of at least {_LEAST_GROUP}"
            yield Problem("parallel.gather", text)

    def _mixture_problems(self) -> Iterator[Problem]:
        """Of when the mixture changes, and of what its controller needs."""
        stage, batch = self.stage, self.batch
        times = timeline(stage.phases, stage.tokens, self.tokens_per_step, batch.seq_length)
        yield from timeline_problems(stage.phases, times, -(-stage.tokens // batch.seq_length))
        if stage.controller is not None and not self.evaluate.streams.keys() - stage.mixture.keys():
            text = "it compares losses of earlier streams: add one that is not in stage.mixture to evaluate.streams"
            yield Problem("stage.controller", text)

    def _rate_problems(self) -> Iterator[Problem]:
        schedule, peak = self.schedule, self.optim.peak_lr
        if isinstance(schedule, ConstantSchedule):
            return
        low = schedule.min_lr.value(peak)
        if low > peak:
            yield self._above_peak("schedule.min_lr", schedule.min_lr)
        elif isinstance(schedule, InfiniteSchedule):
            constant = schedule.constant_lr.value(peak)
            if constant > peak:
                yield self._above_peak("schedule.constant_lr", schedule.constant_lr)
            elif constant < low:
                text = f"{_rate(schedule.constant_lr, peak)} is below schedule.min_lr, {_rate(schedule.min_lr, peak)}"
                yield Problem("schedule.constant_lr", text)
        elif isinstance(schedule, TrilmSchedule):
            second = schedule.second_lr.value(peak)
            if second > peak:
                yield self._above_peak("schedule.second_lr", schedule.second_lr)
            elif second < low:
                text = f"{_rate(schedule.second_lr, peak)} is below schedule.min_lr, {_rate(schedule.min_lr, peak)}"
                yield Problem("schedule.second_lr", text)
        elif low == 0:
            key = "shape" if isinstance(schedule, AnnealSchedule) else "decay_shape"
            shape = getattr(schedule, key, None)
            if shape in ("exponential", "reciprocal"):
                article = "an" if shape == "exponential" else "a"
                text = f"{article} {shape} decay never reaches 0: give a rate above 0, or take another schedule.{key}"
                yield Problem("schedule.min_lr", text)

    def _above_peak(self, key: str, rate: Rate) -> Problem:
        peak = self.optim.peak_lr
        text = f"{_rate(rate, peak)} is above optim.peak_lr, {short(peak)}: take less, or a percentage of the peak"
        return Problem(key, text)

    def _phase_problems(self) -> Iterator[Problem]:
        schedule, whole = self.schedule, int(self.stage.tokens)
        if isinstance(schedule, AnnealSchedule):
            return
        warmup = schedule.warmup.tokens(whole, self.tokens_per_step)
        if isinstance(schedule, InfiniteSchedule):
            cooldown = schedule.cooldown.tokens(whole, self.tokens_per_step)
            if cooldown < warmup:
                text = (
                    f"{schedule.cooldown} ({cooldown:,} tokens) ends before the warmup, {schedule.warmup} "
                    f"({warmup:,} tokens): both are counted from the start of the stage, "
                    "so cooldown must be the later"
                )
                yield Problem("schedule.cooldown", text)
        if isinstance(schedule, WsdSSchedule):
            try:
                schedule.decays(whole, self.tokens_per_step)
            except ValueError as error:
                yield Problem("schedule.releases", str(error))
        if isinstance(schedule, WsdSchedule):
            decay = schedule.decay.tokens(whole, self.tokens_per_step)
            if warmup + decay > whole:
                text = f"warmup ({warmup:,} tokens) and decay ({decay:,}) exceed the stage ({whole:,} tokens)"
                yield Problem("schedule.decay", text)

    def _kind_problems(self) -> Iterator[Problem]:
        annealing = isinstance(self.schedule, AnnealSchedule)
        if self.stage.kind == "anneal" and not annealing:
            text = f"a stage of kind anneal needs schedule.kind anneal, not {self.schedule.kind}"
            yield Problem("schedule.kind", text)
        if self.stage.kind == "trunk" and annealing:
            text = "the anneal schedule makes a release branch: set stage.kind to anneal, or another kind here"
            yield Problem("schedule.kind", text)


def _rate(rate: Rate, peak: float) -> str:
    return f"{rate} ({short(rate.value(peak))})" if rate.relative else short(rate.value(peak))
