"""Conversion from and to Hugging Face beside a plain copy of the same files, in turns, and the memory that it takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megacpt.bench.machine import this_machine
from megacpt.bench.result import BenchResult, Interval, Series, ratio
from megacpt.config import ModelConfig, load_model
from megacpt.convert.families import LLAMA, llama_config
from megacpt.convert.from_hf import from_hf
from megacpt.convert.packed_folder import CONFIG
from megacpt.convert.safetensors_writer import Planned, new_folder
from megacpt.convert.to_hf import to_hf
from megacpt.convert.weights import DTYPES
from megacpt.data.files import sync
from megacpt.errors import ConfigError

COPY, IN, OUT = "copy", "from-hf", "to-hf"
TARGET = 0.5
"""Conversion should be at least so fast, as a share of the copy."""
MEMORY_TARGET = 1.3
"""It should take less than so many times the largest tensor."""
_PATTERN = 1 << 20
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class ConvertBench:
    """What is measured.

    Attributes:
        model: a name from configs/models, or a YAML file; a Llama.
        layers: how many of its layers there are; None for all.
        dtype: of the files, and of the checkpoint.
        workers: threads that convert.
        blocks: times of each side.
    """

    model: str = "llama3-8b"
    layers: int | None = 2
    dtype: str = "bfloat16"
    workers: int = 1
    blocks: int = 3

    @property
    def turns(self) -> int:
        """How often `bench_convert` calls `heard`."""
        return self.blocks + 1


def bench_convert(bench: ConvertBench, folder: Path, heard: Callable[[], None] = lambda: None) -> BenchResult:
    """Measure conversions of random weights of real shapes.

    Args:
        bench: what is measured.
        folder: an empty folder on the disk that is to be measured; three times the weights have to fit.
        heard: is called when the weights are there, and after each turn of all sides.

    Raises:
        ConfigError: the disk is too small, the model is no Llama, or its vocabulary is not known.
    """
    model = load_model(bench.model)
    model = model.model_copy(update={"layers": bench.layers or model.layers})
    LLAMA.check(model)
    if model.vocab_size is None:
        raise ConfigError(
            f"{bench.model} says nothing of its vocabulary: take another, or give model.vocab_size in a YAML file"
        )
    source, run, copy, back = (folder / name for name in ("source", "run", "copy", "back"))
    size = _make(source, model, bench.dtype, folder)
    heard()
    sides: dict[str, Callable[[], object]] = {
        COPY: lambda: _copy(source, copy),
        IN: lambda: from_hf(source, run, "bytes", bench.dtype, bench.workers),
        OUT: lambda: to_hf(run, back, bench.dtype),
    }
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    memory: dict[str, float] = {}
    for _ in range(bench.blocks):
        for name, side in sides.items():
            held = _reset_peak()
            start = time.perf_counter()
            side()
            times[name].append([time.perf_counter() - start])
            memory[name] = max(memory.get(name, 0.0), _peak() - held)
        for made in (run, copy, back):
            shutil.rmtree(made)
        heard()
    series = {name: Series(blocks=found, work=float(size), unit="byte") for name, found in times.items()}
    largest = model.padded_vocab() * model.hidden * DTYPES[bench.dtype].itemsize
    # A rate is the inverse of a time: how fast, as a share of the copy.
    figures: dict[str, Interval | float] = {
        f"{name} / {COPY}": ratio(series[COPY], series[name], True) for name in (IN, OUT)
    }
    if _STATUS.is_file():
        figures |= {f"{name}: memory / largest tensor": memory[name] / largest for name in (IN, OUT)}
    config = {**asdict(bench), "bytes": size, "largest": largest, "parameters": model.parameters()}
    return BenchResult(bench="convert", machine=this_machine(), config=config, series=series, figures=figures)


def _make(source: Path, model: ModelConfig, dtype: str, folder: Path) -> int:
    """Write the files of a model; return their bytes."""
    rows, kept = model.padded_vocab(), DTYPES[dtype]
    targets = [target for one in LLAMA.sources(model, rows, rows) for target in one.targets]
    plan = [Planned(target.name, kept, target.shape) for target in targets]
    size = sum(one.bytes for one in plan)
    free = shutil.disk_usage(folder).free
    if free < 4 * size:
        raise ConfigError(
            f"{folder}: {4 * size / 1e9:.0f} GB are needed, and {free / 1e9:.0f} GB are free: take fewer --layers"
        )
    # The same random numbers again and again: making as many new ones would take longer than all that is measured.
    pattern = torch.randn(_PATTERN, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(kept)
    texts = {CONFIG: json.dumps(llama_config(model, rows, 256, dtype))}
    with new_folder(source, plan, texts, {}) as made:
        for one in plan:
            count = torch.Size(one.shape).numel()
            made.write(one.name, pattern.repeat(-(-count // _PATTERN))[:count].view(one.shape))
    return size


def _copy(source: Path, out: Path) -> None:
    """Copy a folder, and wait until the disk has it, as a conversion does."""
    shutil.copytree(source, out)
    for path in (*out.iterdir(), out):
        sync(path)


def _reset_peak() -> float:
    """Begin to measure the largest memory of the process; return what it holds, in bytes."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists() and os.access(clear, os.W_OK):
        clear.write_text("5")
    return _memory("VmRSS")


def _peak() -> float:
    return _memory("VmHWM")


def _memory(word: str) -> float:
    """A line of the process's status, in bytes; 0 where there is none."""
    if not _STATUS.is_file():
        return 0.0
    found = re.search(rf"{word}:\s+(\d+) kB", _STATUS.read_text())
    return 1024.0 * int(found[1]) if found else 0.0
