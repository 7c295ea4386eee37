"""Ternary models: products, generation and training beside float32, and beside llama.cpp where it is at hand."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megacpt.bench import ternary_decode as decode
from megacpt.bench import ternary_layers as layers
from megacpt.bench import ternary_training as training
from megacpt.bench.llama_peer import NAME as LLAMA_CPP
from megacpt.bench.llama_peer import llama_cpp
from megacpt.bench.machine import this_machine
from megacpt.bench.result import BenchResult, Interval, Series, ratio
from megacpt.bench.step import CPU
from megacpt.config import ModelConfig

DECODE_TARGET, LLAMA_TARGET, TRAINING_TARGET = 3.0, 1.0, 1.10
AGREEMENT = "decode: tokens alike before llama.cpp chooses another"


@dataclass(frozen=True)
class TernaryBench:
    """What is measured.

    Attributes:
        model: the model that generates.
        prompt: tokens of its prompt.
        count: tokens that it generates.
        shapes: o rows and i columns of single products.
        tokens: rows of their activations.
        cold: bytes of matrices that each side goes through in turn, more than caches hold.
        training: sections that are laid over the run whose training step is measured.
        blocks: times of every figure, each beside one of the others.
    """

    model: dict[str, Any] = field(default_factory=lambda: dict(decode.SPECTRA_99M))
    prompt: int = 64
    count: int = 64
    shapes: tuple[tuple[int, int], ...] = layers.SHAPES
    tokens: tuple[int, ...] = layers.TOKENS
    cold: int = 64 << 20
    training: dict[str, Any] = field(default_factory=dict)
    blocks: int = 9

    @property
    def turns(self) -> int:
        """How often `heard` of `bench_ternary` is called."""
        return self.blocks * (len(self.shapes) * len(self.tokens) + 2)


QUICK = TernaryBench(
    model={**decode.SPECTRA_99M, "name": "small", "layers": 4, "vocab_size": 4096},
    prompt=16,
    count=16,
    shapes=((2048, 2048),),
    tokens=(1, 16),
    cold=8 << 20,
    training={"model": {"layers": 2, "hidden": 128, "ffn": 256, "heads": 4, "quantise": {"grid": "ternary"}}},
    blocks=3,
)


def bench_ternary(
    bench: TernaryBench, peer: Path | None = None, heard: Callable[[], None] = lambda: None
) -> BenchResult:
    """Measure everything.

    Args:
        bench: what.
        peer: an interpreter that has llama-cpp-python; None to leave llama.cpp out.
        heard: is called after each turn of the sides of a figure.

    Raises:
        SetupError: llama.cpp does not start.
    """
    machine = this_machine()
    series = layers.time_layers(bench.shapes, bench.tokens, bench.cold, bench.blocks, heard)
    decoded, tokens = _time_decoding(bench, peer, heard)
    series |= decoded
    config = training.training_config(**bench.training)
    series |= training.time_training(config, bench.blocks, heard)
    figures: dict[str, Interval | float] = dict(_ratios(series, bench))
    if LLAMA_CPP in tokens:
        figures[AGREEMENT] = float(_common(tokens[decode.INT8], tokens[LLAMA_CPP]))
    settings = {key: value for key, value in vars(bench).items() if key != "training"}
    return BenchResult(
        bench="ternary",
        machine=machine,
        config={**settings, "training": config.model_dump(mode="json", include={"model", "batch", "precision"})},
        series=series,
        figures=figures,
    )


def _time_decoding(
    bench: TernaryBench, peer: Path | None, heard: Callable[[], None]
) -> tuple[dict[str, Series], dict[str, list[int]]]:
    model = ModelConfig.model_validate(bench.model)
    sides = decode.our_sides(model)
    with ExitStack() as stack:
        if peer is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megacpt-bench-")))
            context = bench.prompt + bench.count
            sides[LLAMA_CPP] = stack.enter_context(llama_cpp(peer, model, folder, torch.get_num_threads(), context))
        return decode.time_decoding(sides, bench.prompt, bench.count, bench.blocks, heard)


def _ratios(series: dict[str, Series], bench: TernaryBench) -> Iterator[tuple[str, Interval]]:
    """How many times as fast ours is; and what a ternary training step costs of a float one."""
    for o, i in bench.shapes:
        for count in bench.tokens:
            case = layers.case_name(o, i, count)
            for side in (layers.INT8, layers.FLOAT):
                for other in (layers.FLOAT32, layers.BFLOAT16):
                    yield _speed_up(series, case, side, other)
    for part in (decode.DECODE, decode.PREFILL):
        for side in (decode.INT8, decode.FLOAT):
            for other in (decode.DENSE, decode.DENSE_TORCH, LLAMA_CPP):
                if f"{part}: {other}" in series:
                    yield _speed_up(series, part, side, other)
    for suffix in ("", f": {CPU}"):
        pair = (series[f"{training.TERNARY}{suffix}"], series[f"{training.FLOAT}{suffix}"])
        yield f"{training.TERNARY} / float{suffix}", ratio(*pair, paired=True)


def _speed_up(series: dict[str, Series], case: str, side: str, other: str) -> tuple[str, Interval]:
    return f"{case}: {side} x {other}", ratio(series[f"{case}: {other}"], series[f"{case}: {side}"], paired=True)


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens two lists share from the beginning on."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))
