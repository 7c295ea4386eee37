"""What a process does that measures a loader: start it, take batches, and say what that took.

A process measures once. Its modules are imported before the clock starts; it is single-threaded and without workers on
either side, so that times are the work there is and not how well it is hidden.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.ma  # numpy.unique, which both sides call, imports it at its first call
import torch
import torch.distributed as dist

import megacpt.runtime  # noqa: F401  prepares megatron.core for import
from megacpt.bench.step import bench_config
from megacpt.data.batches import microbatches
from megacpt.data.plan import Segment, Source, StagePlan
from megacpt.data.stage_data import StageData
from megacpt.data.stream import StreamMeta
from megacpt.data.tokenizer import load_tokenizer
from megacpt.engine.megatron import MegatronEngine
from megacpt.engine.protocol import Batch
from megacpt.errors import SetupError

CHUNK = 16
"""Microbatches between two looks at the clock."""
OURS, PEER, PEER_IDS = "megacpt", "Megatron Core", "Megatron Core, ids alone"
_KEY = 1


@dataclass(frozen=True)
class Work:
    """What both sides are asked for.

    Attributes:
        streams: stream folders.
        weights: their shares of the samples.
        seq_length: tokens in a sample, and one more.
        sequences: samples of an optimizer step.
        microbatch: samples handed over together.
        samples: of the stage.
        index: a folder for files that a side builds.
    """

    streams: tuple[str, ...]
    weights: tuple[float, ...]
    seq_length: int
    sequences: int
    microbatch: int
    samples: int
    index: str


@dataclass(frozen=True)
class Trial:
    """What one process measured.

    Attributes:
        start: seconds from nothing to the first microbatch.
        memory: bytes by which the peak of the resident memory grew until then, mapped files aside.
        times: seconds for each `CHUNK` microbatches after the first.
    """

    start: float
    memory: int
    times: list[float]


def measure(side: str, work: Work, seconds: float) -> Trial:
    """Start a side, take its first microbatch, then as many as fit into `seconds`."""
    make = _SIDES[side]
    if side != OURS:
        _ready_for_megatron()
    (peak, mapped), begin = _memory(), time.perf_counter()
    batches = make(work)
    next(batches)
    start = time.perf_counter() - begin
    times: list[float] = []
    peak_then, mapped_then = _memory()
    while sum(times) < seconds:
        begin, taken = time.perf_counter(), 0
        for _held in islice(batches, CHUNK):  # a batch lives until the next one is there, as in training
            taken += 1
        if taken < CHUNK:
            break
        times.append(time.perf_counter() - begin)
    return Trial(start, peak_then - peak - (mapped_then - mapped), times)


def our_batches(work: Work) -> Iterator[Batch]:
    """Microbatches as megacpt's engine takes them: token ids [microbatch, seq_length + 1], a step at a time."""
    data = StageData(_plan(work.streams, work.weights, work.seq_length), tokenizer=load_tokenizer("bytes"))
    for step in range(work.samples // work.sequences):
        for ids in microbatches(data, step, work.sequences, work.microbatch, 0, 1):
            yield Batch(ids)


def megatron_batches(work: Work) -> Iterator[dict[str, torch.Tensor]]:
    """Microbatches as Megatron Core's training takes them: tokens, labels, loss mask and positions."""
    yield from torch.utils.data.DataLoader(_megatron_dataset(work), work.microbatch, shuffle=False, drop_last=True)


def megatron_ids(work: Work) -> Iterator[np.ndarray]:
    """The token ids [microbatch, seq_length + 1] that Megatron Core finds, before it makes tensors of them."""
    dataset = _megatron_dataset(work)
    for first in range(0, work.samples - work.microbatch + 1, work.microbatch):
        places = range(first, first + work.microbatch)
        if len(work.streams) == 1:
            found = [(dataset, at) for at in places]
        else:
            found = [(dataset.datasets[dataset.dataset_index[at]], dataset.dataset_sample_index[at]) for at in places]
        yield np.stack([source._query_document_sample_shuffle_indices(at)[0] for source, at in found])


_SIDES: dict[str, Callable[[Work], Iterator[Any]]] = {
    OURS: our_batches,
    PEER: megatron_batches,
    PEER_IDS: megatron_ids,
}


def feed(model: str, stream: str, steps: int, threads: int) -> tuple[list[float], list[float], int]:
    """Train `model` of configs/models on `stream` with the default batch of ``megacpt bench step``.

    Returns:
        Seconds to load each step, seconds to train it, and tokens of a step.
    """
    torch.set_num_threads(threads)
    config = bench_config(None, model)
    batch, tokenizer = config.batch, load_tokenizer(config.tokenizer)
    data = StageData(_plan((stream,), (1.0,), batch.seq_length), tokenizer=tokenizer)
    engine = MegatronEngine(config, tokenizer.vocab_size)
    loading, training = [], []
    for step in range(steps + 2):  # the first two warm up
        begin = time.perf_counter()
        batches = [Batch(ids) for ids in microbatches(data, step, batch.sequences, batch.microbatch, 0, 1)]
        loaded = time.perf_counter()
        engine.train_step(batches, config.optim.peak_lr, config.optim.weight_decay)
        loading.append(loaded - begin)
        training.append(time.perf_counter() - loaded)
    return loading[2:], training[2:], config.tokens_per_step


def _plan(streams: tuple[str, ...], weights: tuple[float, ...], seq_length: int) -> StagePlan:
    """All of each stream in its order, as a first stage reads them."""
    sources = []
    for at, (folder, weight) in enumerate(zip(streams, weights, strict=True)):
        known = StreamMeta.read(Path(folder)).content_hash
        segment = Segment(_KEY, seq_length, 0, None)
        sources.append(Source(str(at), folder, known, "new", None, weight, (segment,)))
    return StagePlan(seq_length, _KEY, tuple(sources))


def _megatron_dataset(work: Work) -> Any:
    """The training split of Megatron Core's builder: a GPTDataset, or for several streams a BlendedDataset of them."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    prefixes = [str(Path(folder) / StreamMeta.read(Path(folder)).files) for folder in work.streams]
    weights = list(work.weights) if len(prefixes) > 1 else None
    bytes_tokenizer = load_tokenizer("bytes")
    config = GPTDatasetConfig(
        random_seed=_KEY,
        sequence_length=work.seq_length,
        blend=(prefixes, weights),
        split="1,0,0",
        path_to_cache=work.index,
        tokenizer=SimpleNamespace(
            vocab_size=bytes_tokenizer.vocab_size, eod=bytes_tokenizer.eod, pad=-1, unique_identifiers={}
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [work.samples, 0, 0]
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]


def _ready_for_megatron() -> None:
    """Import what Megatron Core's datasets need, and make the process group that they ask for their rank.

    Raises:
        SetupError: their compiled part is missing; they cannot work without it.
    """
    import megatron.core.datasets.blended_megatron_dataset_builder
    import megatron.core.datasets.gpt_dataset

    try:
        import megatron.core.datasets.helpers  # noqa: F401
    except ImportError as error:
        raise SetupError(
            "this installation of megatron-core lacks its compiled helpers (megatron.core.datasets.helpers_cpp), "
            "without which its datasets do not work: reinstall megatron-core, or measure megacpt alone with "
            "--peer-limit 0"
        ) from error
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _memory() -> tuple[int, int]:
    """Bytes of resident memory at this process's peak so far, and bytes of mapped files in it now.

    Pages of mapped files belong to the page cache, and are there or not for reasons of their own.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024), 0
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssFile"))  # type: ignore[return-value]
