"""Our loader beside Megatron Core's on the same token files: start-up, memory, index files, samples a second.

Every measurement is a fresh process, and the sides take turns. A stage takes nine tenths of a stream, so that Megatron
Core builds the index of one epoch; the blend is of three streams that together are as long as the single one.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

from megacpt.bench.loaders import CHUNK, OURS, PEER, PEER_IDS, Trial, Work, feed, measure
from megacpt.bench.machine import this_machine
from megacpt.bench.result import BenchResult, Interval, Series, ratio
from megacpt.bench.streams import DENSE, make_stream
from megacpt.config import load_model
from megacpt.data.indexed import token_files
from megacpt.errors import ConfigError, MegacptError

FIRST, AGAIN, SPEED, MEMORY, INDEX = "first start", "start again", "microbatches", "memory", "index files"
LOADING, TRAINING = "loading a step", "training a step"
BLEND = (0.5, 0.3, 0.2)
_STAGE_SHARE = 0.9
_ONCE = 1e-9
_FEED_STEPS, _FEED_TOKENS = 8, 10**7
_Arguments = ParamSpec("_Arguments")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class DataBench:
    """What to measure.

    Attributes:
        tokens: of the streams, one size after another.
        seq_length: of a sample, in tokens.
        sequences: samples of an optimizer step, which megacpt loads at once; a multiple of `microbatch`.
        microbatch: samples handed over together.
        document: mean length of a document, in tokens.
        repeats: fresh processes for each figure.
        seconds: for which a process takes microbatches.
        peer_limit: Megatron Core is measured up to this size, since its index grows with the stream.
        models: of configs/models whose training step says how fast a loader has to be.
        threads: of torch, for those models.
    """

    tokens: tuple[int, ...] = (10**7, 10**8, 10**9, 10**12)
    seq_length: int = 4096
    sequences: int = 32
    microbatch: int = 8
    document: int = 1000
    repeats: int = 5
    seconds: float = 0.5
    peer_limit: int = 10**9
    models: tuple[str, ...] = ("tiny", "small")
    threads: int = 1


def case_name(tokens: int, streams: int) -> str:
    """How results call the case: ``100M tokens, 3 streams``."""
    unit, letter = next((u, x) for u, x in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (1, "")) if tokens >= u)
    return f"{tokens / unit:g}{letter} tokens, {streams} stream{'s' * (streams > 1)}"


def bench_data(
    bench: DataBench, folder: Path | None = None, heard: Callable[[int, int], None] = lambda _done, _of: None
) -> BenchResult:
    """Measure both loaders on random streams, and how much faster ours is than models train.

    Args:
        bench: what to measure.
        folder: where the streams are made, and deleted afterwards; the system's place for temporary files by default.
        heard: is called after each measurement with how many are done, and of how many.

    Raises:
        ConfigError: a stream is too short to measure, or there is no such model.
        MegacptError: the streams find no place, or a process dies.
    """
    _check(bench)
    total = len(bench.tokens) * 2 * bench.repeats + len(bench.models)
    done, machine = count(1), this_machine()
    series, figures = dict[str, Series](), dict[str, Interval | float]()
    with tempfile.TemporaryDirectory(prefix="megacpt-bench-", dir=folder) as made:
        for tokens in bench.tokens:
            for name, work in _cases(bench, tokens, Path(made) / f"{tokens}"):
                turns = []
                for turn in range(bench.repeats):
                    turns.append(_turn(work, tokens, bench, turn))
                    heard(next(done), total)
                _add(name, turns, bench, series, figures)
        for model in bench.models:
            _feed(model, Path(made) / model, bench, series, figures)
            heard(next(done), total)
    helpers = find_spec("megatron.core.datasets.helpers_cpp")
    config = asdict(bench) | {"megatron_helpers": Path(helpers.origin).name if helpers and helpers.origin else None}
    return BenchResult(bench="data", machine=machine, config=config, series=series, figures=figures)


def _check(bench: DataBench) -> None:
    """Refuse sizes that leave nothing to measure, before any work is done."""
    if not bench.tokens or bench.repeats < 2:
        raise ConfigError("bench data needs at least one --tokens and two --repeats")
    if bench.sequences % bench.microbatch:
        raise ConfigError(f"--sequences {bench.sequences} must be a multiple of --microbatch {bench.microbatch}")
    shortest = max(bench.document, bench.seq_length + 1) / min(BLEND)
    least = int(max(shortest, (CHUNK * bench.microbatch + 2 * bench.sequences) * bench.seq_length / _STAGE_SHARE)) + 1
    if short := [tokens for tokens in bench.tokens if tokens < least]:
        raise ConfigError(
            f"--tokens {min(short):,} is too short for documents of {bench.document:,} tokens and samples of "
            f"{bench.seq_length:,}: take {least:,} or more, or fewer and shorter samples"
        )
    for model in bench.models:
        load_model(model)


def _cases(bench: DataBench, tokens: int, folder: Path) -> Iterator[tuple[str, Work]]:
    """One stream of `tokens`, then a blend of three that are as long together; each is there while it is measured."""
    samples, index = int(tokens * _STAGE_SHARE) // bench.seq_length, str(folder / "index")
    for weights in ((1.0,), BLEND):
        for at, weight in enumerate(weights):
            make_stream(folder / f"stream{at}", int(tokens * weight), bench.document, seed=at)
        made = tuple(str(folder / f"stream{at}") for at in range(len(weights)))
        shape = (bench.seq_length, bench.sequences, bench.microbatch)
        yield case_name(tokens, len(made)), Work(made, weights, *shape, samples, index)
        shutil.rmtree(folder)


@dataclass(frozen=True)
class _Turn:
    """One repeat of one side: from nothing, again with what the first left behind, and the bytes that it left."""

    first: Trial
    again: Trial
    index: int


def _turn(work: Work, tokens: int, bench: DataBench, turn: int) -> dict[str, _Turn]:
    """Measure the sides after each other; who goes first changes with `turn`."""
    sides = [OURS, PEER, PEER_IDS] if tokens <= bench.peer_limit else [OURS]
    found = {}
    for side in sides if turn % 2 == 0 else reversed(sides):
        Path(work.index).mkdir()
        trials, before = [], _bytes_below(Path(work.index).parent)
        # Cold reads get faster as the file comes into memory: each side gets as many of them.
        for seconds in (0.0, bench.seconds if tokens <= DENSE else _ONCE):
            same_cache(work, tokens)
            trials.append(alone(measure, side, work, seconds))
        found[side] = _Turn(trials[0], trials[1], _bytes_below(Path(work.index).parent) - before)
        shutil.rmtree(work.index)
    return found


def same_cache(work: Work, tokens: int) -> None:
    """Bring the ids into memory, or those of streams that no memory holds out of it, so that no side profits."""
    for folder in work.streams:
        bin_path, _ = token_files(Path(folder) / "tokens")
        with bin_path.open("rb", buffering=0) as file:
            if tokens > DENSE:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                continue
            while file.read(1 << 24):
                pass


def _add(
    name: str,
    turns: Sequence[dict[str, _Turn]],
    bench: DataBench,
    series: dict[str, Series],
    figures: dict[str, Interval | float],
) -> None:
    """Put the turns of a case into the result."""
    made: dict[str, dict[str, Series]] = defaultdict(dict)
    for side in turns[0]:
        own = [turn[side] for turn in turns]
        made[side][FIRST] = Series(blocks=[[turn.first.start] for turn in own], unit="start")
        made[side][AGAIN] = Series(blocks=[[turn.again.start] for turn in own], unit="start")
        work = float(CHUNK * bench.microbatch)
        made[side][SPEED] = Series(blocks=[turn.again.times for turn in own], work=work, unit="sample")
        figures[f"{name}: {side}: {MEMORY}"] = statistics.median(float(turn.first.memory) for turn in own)
        figures[f"{name}: {side}: {INDEX}"] = statistics.median(float(turn.index) for turn in own)
    series.update({f"{name}: {side}: {what}": one for side, own in made.items() for what, one in own.items()})
    for what in (FIRST, AGAIN, SPEED) if PEER in made else ():
        figures[f"{name}: {what}: {OURS} / {PEER}"] = ratio(made[OURS][what], made[PEER][what], paired=True)


def _feed(
    model: str, folder: Path, bench: DataBench, series: dict[str, Series], figures: dict[str, Interval | float]
) -> None:
    """Train a model on a stream for some steps, and put what loading and training took into the result."""
    make_stream(folder, _FEED_TOKENS, bench.document)
    loading, training, tokens = alone(feed, model, str(folder), _FEED_STEPS, bench.threads)
    for what, times in ((TRAINING, training), (LOADING, loading)):
        series[f"{model}: {what}"] = Series(blocks=[[time] for time in times], work=float(tokens), unit="token")
    training_series, loading_series = (series[f"{model}: {what}"] for what in (TRAINING, LOADING))
    figures[f"{model}: {TRAINING} / {LOADING}"] = ratio(training_series, loading_series, paired=True)


def alone(work: Callable[_Arguments, _Found], *arguments: _Arguments.args, **keywords: _Arguments.kwargs) -> _Found:
    """Call `work` in a process of its own, forked from one that has imported everything and done nothing."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["megacpt.bench.loaders"])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(work, *arguments, **keywords).result()
        except BrokenProcessPool as error:
            raise MegacptError(
                "a process that measured a loader ended unexpectedly, as when memory runs out: measure smaller "
                "--tokens, or Megatron Core on less with --peer-limit"
            ) from error


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
