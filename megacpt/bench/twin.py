"""The step of a model with experts beside that of its dense twin, in which a token costs the same FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megacpt.bench.machine import this_machine
from megacpt.bench.result import BenchResult, Interval, ratio
from megacpt.bench.step import CPU, Side, Watch, described, in_turns
from megacpt.config import RunConfig, load_model, load_run, run_from_mapping
from megacpt.config.twin import dense_twin
from megacpt.data.tokenizer import load_tokenizer
from megacpt.engine.megatron import MegatronEngine
from megacpt.errors import ConfigError

DEFAULT_MODEL: dict[str, Any] = {
    "name": "bench, 31+1 experts",
    "layers": 4,
    "hidden": 256,
    "ffn": 704,
    "heads": 4,
    "moe": {"experts": 31, "top_k": 3, "ffn": 176, "shared_ffn": 176},
}
DEFAULT_BATCH = {"sequences": 32, "seq_length": 256, "microbatch": 8}
TARGET = 1.25


def twin_config(run: Path | None, model: str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The run to measure: a run file, or a model (the default one of 31+1 experts) with a default batch.

    Raises:
        ConfigError: as `config.load_run`; `run` and `model` are both given; the model has no experts.
    """
    if run is not None and model is not None:
        raise ConfigError("give a run file or --model, not both; in a run file `model=NAME` changes the model")
    mapping = {
        "run": "bench",
        "model": DEFAULT_MODEL if model is None else load_model(model).model_dump(),
        "tokenizer": "bytes",
        "stage": {"name": "bench", "tokens": "1M", "mixture": {"random": "random tokens"}},
        "schedule": {"kind": "constant"},
        "optim": {"peak_lr": 1e-4},
        "batch": DEFAULT_BATCH,
    }
    config = load_run(run, overrides) if run is not None else run_from_mapping(mapping, overrides)
    if config.model.moe is None:
        raise ConfigError(f"model.moe: {config.model.name or 'this model'} has no experts, so there is no twin")
    return config


def bench_twin(
    config: RunConfig, blocks: int = 10, heard: Callable[[int, int], None] = lambda _done, _blocks: None
) -> BenchResult:
    """Measure both steps in alternating blocks.

    Args:
        config: what to measure, of `twin_config`.
        blocks: as for `step.bench_step`.
        heard: as for `step.bench_step`.
    """
    machine = this_machine()
    vocab = config.model.vocab_size or load_tokenizer(config.tokenizer).vocab_size
    twin = dense_twin(config.model, config.batch.seq_length, vocab)
    sides = []
    for name, model in (("experts", twin.experts), ("dense twin", twin.dense)):
        parallel = config.parallel.model_copy(update={"expert": 1})
        engine = MegatronEngine(config.model_copy(update={"model": model, "parallel": parallel}), vocab)
        engine.schedule = Watch(engine.schedule)
        sides.append(Side(name, engine, engine.schedule))
    series = in_turns((sides[0], sides[1]), config, vocab, blocks, heard, alike=False)
    experts, dense = twin.costs
    figures: dict[str, Interval | float] = {
        "experts / dense twin": ratio(series["experts"], series["dense twin"], paired=True),
        f"experts / dense twin: {CPU}": ratio(series[f"experts: {CPU}"], series[f"dense twin: {CPU}"], paired=True),
        "parameters": float(experts.parameters),
        "active parameters": float(experts.active),
        "parameters of the twin": float(dense.parameters),
    }
    return BenchResult(bench="twin", machine=machine, config=described(config), series=series, figures=figures)
