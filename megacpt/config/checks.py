"""Does the layout fit the model, the batch and the ranks, and are the streams there?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megacpt.config.base import Problem
from megacpt.config.quantise import layout_problems as quantise_problems
from megacpt.config.run import RunConfig
from megacpt.errors import ConfigError, LayoutError, nearest

STREAM_FILE = "stream.json"


def check_layout(config: RunConfig, world_size: int | None = None, vocab: int | None = None) -> None:
    """Check that the parallel layout divides what it has to divide.

    Args:
        config: the run.
        world_size: number of ranks; None checks only what does not depend on it.
        vocab: number of entries of the tokenizer; None checks only what does not depend on it.

    Raises:
        LayoutError: lists everything that does not fit, with key, reason and the nearest valid choices.
    """
    problems = list(layout_problems(config, world_size, vocab))
    if problems:
        raise LayoutError("\n".join(map(str, problems)))


def check_streams(config: RunConfig) -> None:
    """Check that all streams of the run are there (folders that hold stream.json).

    Raises:
        ConfigError: lists all that are missing, each with the nearest stream beside it.
    """
    problems = list(stream_problems(config))
    if problems:
        raise ConfigError("\n".join(map(str, problems)))


def check(config: RunConfig, world_size: int | None = None, vocab: int | None = None) -> None:
    """Check layout and streams together; raise ConfigError that lists everything that is wrong."""
    problems = [*layout_problems(config, world_size, vocab), *stream_problems(config)]
    if problems:
        raise ConfigError("\n".join(map(str, problems)))


def layout_problems(config: RunConfig, world_size: int | None = None, vocab: int | None = None) -> Iterator[Problem]:
    """Yield what `check_layout` raises."""
    yield from _tensor_problems(config, vocab)
    yield from _pipeline_problems(config)
    yield from _expert_problems(config, world_size)
    yield from quantise_problems(config.model, config.parallel.tensor)
    yield from _sequence_problems(config)
    yield from _evaluation_problems(config)
    yield from _vocab_problems(config, vocab)
    yield from _batch_problems(config, world_size)


def _tensor_problems(config: RunConfig, vocab: int | None) -> Iterator[Problem]:
    model, size = config.model, config.parallel.tensor
    reasons = [text for text, fits in _tensor_rules(config, vocab) if not fits(size)]
    if reasons:
        rules = [fits for _, fits in _tensor_rules(config, vocab)]
        valid = [n for n in _divisors(model.heads) if all(fits(n) for fits in rules)]
        yield Problem("parallel.tensor", f"{size} {', '.join(reasons)}: {_take(valid, size)}")


def _tensor_rules(config: RunConfig, vocab: int | None) -> list[tuple[str, Callable[[int], bool]]]:
    """What tensor parallelism has to divide: words for the message, and the test."""
    model = config.model
    rules: list[tuple[str, Callable[[int], bool]]] = [
        (f"does not divide model.heads ({model.heads})", lambda n: model.heads % n == 0),
        (
            f"neither divides model.kv_heads ({model.kv_heads}) nor is a multiple of it",
            lambda n: model.kv_heads % n == 0 or n % model.kv_heads == 0,
        ),
    ]
    if model.qk_norm == "all_heads":
        # Ranks that share a head of keys would count it more than once.
        text = f"does not divide model.kv_heads ({model.kv_heads}), which model.qk_norm: all_heads needs"
        rules.append((text, lambda n: model.kv_heads % n == 0))
    if not all(model.moe_layers):
        rules.append((f"does not divide model.ffn ({model.ffn})", lambda n: model.ffn % n == 0))
    shared = 0 if model.moe is None else model.moe.shared_ffn
    if shared:
        rules.append((f"does not divide model.moe.shared_ffn ({shared})", lambda n: shared % n == 0))
    if model.vocab_size is not None or vocab is not None:
        padded = model.padded_vocab(vocab)
        rules.append((f"does not divide the padded vocabulary ({padded})", lambda n: padded % n == 0))
    if config.parallel.sequence:
        share = max(1, config.batch.seq_length // config.parallel.context)
        rules.append((f"does not divide the {share} tokens of a sequence on each rank", lambda n: share % n == 0))
    return rules


def _pipeline_problems(config: RunConfig) -> Iterator[Problem]:
    layers, parallel = config.model.layers, config.parallel
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    if virtual > 1 and pipeline == 1:
        text = f"{virtual} needs parallel.pipeline above 1: take 1 here, or more pipeline stages"
        yield Problem("parallel.virtual_pipeline", text)
    elif layers % (pipeline * virtual):
        if layers % pipeline or virtual == 1:
            valid = [n for n in _divisors(layers) if layers % (n * virtual) == 0]
            needed = f"{pipeline} stages" if virtual == 1 else f"{pipeline} stages of {virtual} groups each"
            yield Problem(
                "parallel.pipeline",
                f"{needed} do not divide model.layers ({layers}): {_take(valid, pipeline)}",
            )
        else:
            valid = _divisors(layers // pipeline)
            text = f"{virtual} groups on each of {pipeline} stages do not divide model.layers ({layers})"
            yield Problem("parallel.virtual_pipeline", f"{text}: {_take(valid, virtual)}")


def _expert_problems(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    moe, parallel = config.model.moe, config.parallel
    if moe is None:
        if parallel.expert > 1:
            text = f"{parallel.expert} ranks are to share experts, but the model has none: take 1, or give model.moe"
            yield Problem("parallel.expert", text)
        return
    if parallel.tensor > 1 and not parallel.sequence:
        text = "false: a model with experts needs sequence parallelism where parallel.tensor is above 1: take true"
        yield Problem("parallel.sequence", text)
    if moe.experts % parallel.expert:
        text = f"{parallel.expert} does not divide model.moe.experts ({moe.experts})"
        yield Problem("parallel.expert", f"{text}: {_take(_divisors(moe.experts), parallel.expert)}")
    ranks = None if world_size is None else world_size // parallel.pipeline
    if ranks is not None and ranks % parallel.expert:
        text = f"{parallel.expert} does not divide the {ranks} ranks of a pipeline stage"
        yield Problem("parallel.expert", f"{text}: {_take(_divisors(ranks), parallel.expert)}")


def _sequence_problems(config: RunConfig) -> Iterator[Problem]:
    length, parallel = config.batch.seq_length, config.parallel
    longest = config.model.max_seq_length
    if length > longest:
        text = f"{length} is longer than model.max_seq_length: take at most {longest}, or raise that key"
        yield Problem("batch.seq_length", text)
    if parallel.context > 1 and length % (2 * parallel.context):
        valid = _divisors(length // 2) if length % 2 == 0 else [1]
        text = (
            f"each of {parallel.context} ranks takes two equal chunks of a sequence, but "
            f"{2 * parallel.context} does not divide batch.seq_length ({length}): "
            f"{_take(valid, parallel.context)}, or a batch.seq_length of "
            f"{_either(_multiples_near(length, 2 * parallel.context))}"
        )
        yield Problem("parallel.context", text)
    if parallel.sequence and parallel.tensor == 1:
        text = (
            "true splits the sequence among tensor-parallel ranks, but parallel.tensor is 1: take false, "
            "or parallel.tensor above 1"
        )
        yield Problem("parallel.sequence", text)


def _evaluation_problems(config: RunConfig) -> Iterator[Problem]:
    length, parallel, longest = config.evaluate.seq_length, config.parallel, config.model.max_seq_length
    if length is None:
        return
    if length > longest:
        yield Problem("evaluate.seq_length", f"{length} is longer than model.max_seq_length: take at most {longest}")
    parts = 2 * parallel.context if parallel.context > 1 else 1
    parts *= parallel.tensor if parallel.sequence else 1
    if length % parts:
        near = _either(_multiples_near(length, parts))
        text = f"{length} cannot be cut into {parts} equal parts for the layout (parallel.context, parallel.sequence)"
        yield Problem("evaluate.seq_length", f"{text}: take {near}")


def _vocab_problems(config: RunConfig, vocab: int | None) -> Iterator[Problem]:
    size = config.model.vocab_size
    if size is not None and vocab is not None and vocab > size:
        text = f"{size} is less than the {vocab} entries of the tokenizer: take null or at least {vocab}"
        yield Problem("model.vocab_size", text)


def _batch_problems(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    parallel = config.parallel
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world_size is not None and world_size % ranks:
        text = (
            f"{world_size} ranks are not a multiple of tensor * pipeline * context = {parallel.tensor} * "
            f"{parallel.pipeline} * {parallel.context} = {ranks}: take "
            f"{_either(_multiples_near(world_size, ranks))} ranks, or a smaller layout"
        )
        yield Problem("parallel", text)
        return
    # Without a number of ranks: at least one data-parallel rank takes whole microbatches.
    data = 1 if world_size is None else world_size // ranks
    sequences, microbatch = config.batch.sequences, config.batch.microbatch
    if sequences % (microbatch * data):
        yield _batch_problem(sequences, microbatch, data)
    elif parallel.virtual_pipeline > 1 and parallel.pipeline > 1 and world_size is not None:
        microbatches = sequences // (microbatch * data)
        if microbatches % parallel.pipeline:
            near = _multiples_near(sequences, microbatch * data * parallel.pipeline)
            text = (
                f"{sequences} gives {microbatches} microbatches to a rank; with virtual_pipeline above "
                f"1 they must be a multiple of parallel.pipeline ({parallel.pipeline}): take {_either(near)} sequences"
            )
            yield Problem("batch.sequences", text)


def _batch_problem(sequences: int, microbatch: int, data: int) -> Problem:
    if sequences % data == 0:
        valid = _divisors(sequences // data)
        text = f"{microbatch} does not divide the {sequences // data} sequences of each data-parallel rank"
        return Problem("batch.microbatch", f"{text}: {_take(valid, microbatch)}")
    near = _either(_multiples_near(sequences, microbatch * data))
    text = f"{sequences} is not a multiple of microbatch * data-parallel size = {microbatch} * {data}"
    return Problem("batch.sequences", f"{text}: take {near}")


def stream_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what `check_streams` raises."""
    for name, stream in config.stage.mixture.items():
        yield from _stream_problem(f"stage.mixture.{name}.path", stream.path, config.tokenizer)
    for name, outside in config.stage.replay.streams.items():
        yield from _stream_problem(f"stage.replay.streams.{name}.path", outside.path, config.tokenizer)
    for name, path in config.evaluate.streams.items():
        yield from _stream_problem(f"evaluate.streams.{name}", path, config.tokenizer)


def _stream_problem(key: str, path: Path, tokenizer: str) -> Iterator[Problem]:
    if (path / STREAM_FILE).is_file():
        return
    if path.is_dir():
        inside = sorted(child.parent.name for child in path.glob(f"*/{STREAM_FILE}"))
        hint = f"; it holds the streams {', '.join(inside)}" if inside else ""
        yield Problem(key, f"{path} is not a token stream: it holds no {STREAM_FILE}{hint}")
        return
    siblings = [child.parent.name for child in path.parent.glob(f"*/{STREAM_FILE}")]
    hint = nearest(path.name, siblings)
    out = f"{path}"
    if path.name.endswith("-valid"):  # the name that `data prepare` gives to what it holds out
        out = f"{str(path).removesuffix('-valid')} --holdout 5%"
    make = "" if hint else f"; make it with `megacpt data prepare TEXT... --tokenizer {tokenizer} --out {out}`"
    yield Problem(key, f"{path} does not exist{hint}{make}")


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _take(valid: Sequence[int], given: int) -> str:
    """Name the nearest valid choices below and above what was given."""
    below = [n for n in valid if n < given][-1:]
    above = [n for n in valid if n > given][:1]
    return f"take {_either([*below, *above])}"


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def _multiples_near(number: int, of: int) -> list[int]:
    below = number // of * of
    return [n for n in (below, below + of) if n > 0]
