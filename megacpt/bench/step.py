"""The engine's step beside a plain PyTorch loop: same weights, batches, optimizer and threads, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from megacpt.bench.machine import this_machine
from megacpt.bench.plain import PlainLoop
from megacpt.bench.result import BenchResult, Interval, Series, ratio
from megacpt.config import RunConfig, load_model, load_run, run_from_mapping
from megacpt.data.tokenizer import load_tokenizer
from megacpt.engine.megatron import MegatronEngine
from megacpt.engine.protocol import Batch, StepReport
from megacpt.errors import ConfigError, LayoutError, MegacptError
from megacpt.runtime.layout import world_size

DEFAULT_MODEL: dict[str, Any] = {
    "name": "bench, 10M parameters",
    "layers": 6,
    "hidden": 384,
    "ffn": 1024,
    "heads": 6,
    "kv_heads": 2,
}
DEFAULT_BATCH = {"sequences": 8, "seq_length": 256, "microbatch": 2}
TARGET = 1.15
CPU, PASSES = "processor time", "forward and backward"
_BLOCK_SECONDS = 0.5  # long enough that caches and clocks settle, short beside drifts of the machine's load
_AGREEMENT = {"float32": 1e-4, "bfloat16": 2e-2}


class _Steps(Protocol):
    def train_step(self, batches: Sequence[Batch], rate: float, weight_decay: float) -> StepReport: ...


def bench_config(run: Path | None, model: str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The run to measure: a run file, or a model (the default one of 10M parameters) with a default batch.

    Its streams and schedule play no part: the batches are random tokens.

    Raises:
        ConfigError: as `config.load_run`; or `run` and `model` are both given, or ask for recomputation.
        LayoutError: the run is spread over ranks.
    """
    if run is not None and model is not None:
        raise ConfigError("give a run file or --model, not both; in a run file `model=NAME` changes the model")
    config = load_run(run, overrides) if run is not None else run_from_mapping(_default_run(model), overrides)
    parallel = config.parallel
    wide = [f"parallel.{axis}=1" for axis in ("tensor", "pipeline", "context") if getattr(parallel, axis) > 1]
    if wide or world_size() > 1:
        remedy = f"set {' '.join(wide)}" if wide else "start it without torchrun"
        raise LayoutError(f"bench step compares one process with a plain PyTorch loop: {remedy}")
    if config.recompute != "none":
        raise ConfigError(f"recompute: {config.recompute}: the plain loop recomputes nothing; set recompute=none")
    if config.batch.sequences % config.batch.microbatch:
        raise LayoutError(
            f"batch.sequences: {config.batch.sequences} is no multiple of batch.microbatch, {config.batch.microbatch}"
        )
    return config


def _default_run(model: str | None) -> Mapping[str, Any]:
    return {
        "run": "bench",
        "model": DEFAULT_MODEL if model is None else load_model(model).model_dump(),
        "tokenizer": "bytes",
        "stage": {"name": "bench", "tokens": "1M", "mixture": {"random": "random tokens"}},
        "schedule": {"kind": "constant"},
        "optim": {"peak_lr": 1e-4},
        "batch": DEFAULT_BATCH,
    }


def bench_step(
    config: RunConfig, blocks: int = 10, heard: Callable[[int, int], None] = lambda _done, _blocks: None
) -> BenchResult:
    """Measure the step of the engine and of the plain loop in alternating blocks.

    Args:
        config: what to measure, of `bench_config`.
        blocks: blocks of steps for each of the two; a block lasts half a second or one step.
        heard: is called after each pair of blocks with how many are done, and of how many.

    Raises:
        MegacptError: the two do not compute the same losses.
    """
    machine = this_machine()
    vocab = config.model.vocab_size or load_tokenizer(config.tokenizer).vocab_size
    engine = MegatronEngine(config, vocab)
    plain = PlainLoop(config, vocab, engine.device)
    plain.load(engine.chunks[0].named_parameters())
    engine.schedule = Watch(engine.schedule)
    plain.accumulate = Watch(plain.accumulate)  # type: ignore[method-assign]
    sides = (Side("engine", engine, engine.schedule), Side("plain", plain, plain.accumulate))
    series = in_turns(sides, config, vocab, blocks, heard, alike=True)
    figures: dict[str, Interval | float] = {
        "engine / plain": ratio(series["engine"], series["plain"], paired=True),
        f"engine / plain: {CPU}": ratio(series[f"engine: {CPU}"], series[f"plain: {CPU}"], paired=True),
        "parameters": float(config.model.parameters(vocab)),
    }
    return BenchResult(bench="step", machine=machine, config=described(config), series=series, figures=figures)


def in_turns(
    sides: tuple[Side, Side],
    config: RunConfig,
    vocab: int,
    blocks: int,
    heard: Callable[[int, int], None],
    alike: bool,
) -> dict[str, Series]:
    """Measure two sides on the same random tokens in alternating blocks.

    Args:
        sides: the two.
        config: what gives batch, rate and seed.
        vocab: entries of the tokenizer.
        blocks: blocks of steps for each; a block lasts half a second or one step.
        heard: as for `bench_step`.
        alike: whether both have to give the same losses.
    """
    draw = random_batches(config, vocab)
    steps = _warm_up(sides, draw, config, alike)
    for done in range(blocks):
        batches = [next(draw) for _ in range(steps)]
        for side in sides if done % 2 else reversed(sides):
            side.block(batches, config)
        heard(done + 1, blocks)
    return {
        name: Series(blocks=times, work=float(config.tokens_per_step), unit="token")
        for side in sides
        for name, times in side.series().items()
    }


class Watch:
    """Remembers how long each call of a function took."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.times: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, and remember for how long."""
        start = time.perf_counter()
        result = self.function(*args, **kwargs)
        _wait()
        self.times.append(time.perf_counter() - start)
        return result


class Side:
    """One of the two, and the times of its steps: in all, on the processor, and of the watched passes."""

    def __init__(self, name: str, steps: _Steps, watch: Watch) -> None:
        self.name, self.steps, self.watch = name, steps, watch
        self.whole: list[list[float]] = []
        self.processor: list[list[float]] = []
        self.passes: list[list[float]] = []

    def step(self, batches: list[Batch], config: RunConfig) -> tuple[float, float, float]:
        """Take a step; return its seconds, its seconds on all processors together, and its loss."""
        wall, processor = time.perf_counter(), time.process_time()
        report = self.steps.train_step(batches, config.optim.peak_lr, config.optim.weight_decay)
        _wait()
        return time.perf_counter() - wall, time.process_time() - processor, report.loss

    def block(self, batches: list[list[Batch]], config: RunConfig) -> None:
        """Take the steps and remember their times."""
        self.watch.times = []
        taken = [self.step(batch, config) for batch in batches]
        self.whole.append([wall for wall, _, _ in taken])
        self.processor.append([processor for _, processor, _ in taken])
        self.passes.append(self.watch.times)

    def series(self) -> dict[str, list[list[float]]]:
        """The blocks by the name of the series."""
        return {
            self.name: self.whole,
            f"{self.name}: {CPU}": self.processor,
            f"{self.name}: {PASSES}": self.passes,
        }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_batches(config: RunConfig, vocab: int) -> Iterator[list[Batch]]:
    """Endless steps of random tokens."""
    draw = np.random.default_rng(config.seed)
    shape = (config.batch.sequences, config.batch.seq_length + 1)
    while True:
        tokens = draw.integers(0, vocab, shape)
        yield [Batch(rows) for rows in np.split(tokens, config.batch.sequences // config.batch.microbatch)]


def _warm_up(sides: tuple[Side, Side], draw: Iterator[list[Batch]], config: RunConfig, alike: bool) -> int:
    """Take a few steps, check that both do the same if they should, and return how many steps make a block."""
    seconds = []
    for _ in range(3):
        batches = next(draw)
        (first, _, ours), (second, _, theirs) = (side.step(batches, config) for side in sides)
        if alike and not abs(ours - theirs) <= _AGREEMENT[config.precision] * abs(theirs):
            raise MegacptError(
                f"the engine's loss is {ours:.6f} and the plain loop's {theirs:.6f}: they do not compute the same "
                "thing, so that their times say nothing"
            )
        seconds.append(first + second)
    return max(1, round(2 * _BLOCK_SECONDS / min(seconds)))


def described(config: RunConfig) -> dict[str, Any]:
    """The settings that the times depend on."""
    kept = {"model", "batch", "precision", "optim", "parallel"}
    return config.model_dump(mode="json", include=kept)
