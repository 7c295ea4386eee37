"""The training step of a ternary model beside that of the same model in float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megacpt.bench.result import Series
from megacpt.bench.step import Side, Watch, in_turns
from megacpt.config import RunConfig, run_from_mapping
from megacpt.data.tokenizer import load_tokenizer
from megacpt.engine.megatron import MegatronEngine

TERNARY, FLOAT = "training, ternary", "training, float"
ACCUMULATION = 8
_MODEL = {"name": "bench", "layers": 4, "hidden": 512, "ffn": 1280, "heads": 8}
_BATCH = {"sequences": ACCUMULATION, "seq_length": 256, "microbatch": 1}


def training_config(**changes: Any) -> RunConfig:
    """The run whose step is measured; `changes` are sections that are laid over it."""
    mapping: dict[str, Any] = {
        "run": "bench",
        "model": {**_MODEL, "quantise": {"grid": "ternary"}},
        "tokenizer": "bytes",
        "stage": {"name": "bench", "tokens": "1M", "mixture": {"random": "random tokens"}},
        "schedule": {"kind": "constant"},
        "optim": {"peak_lr": 1e-4},
        "batch": _BATCH,
    }
    for section, keys in changes.items():
        mapping[section] = {**mapping[section], **keys}
    return run_from_mapping(mapping, ())


def time_training(config: RunConfig, blocks: int, heard: Callable[[], None]) -> dict[str, Series]:
    """Time the steps of both, in turns, on the same random tokens.

    Args:
        config: of the ternary one.
        blocks: blocks of steps for each.
        heard: is called after each turn of both.
    """
    vocab = config.model.vocab_size or load_tokenizer(config.tokenizer).vocab_size
    sides = []
    for name, quantise in ((TERNARY, config.model.quantise), (FLOAT, None)):
        model = config.model.model_copy(update={"quantise": quantise})
        engine = MegatronEngine(config.model_copy(update={"model": model}), vocab)
        engine.schedule = Watch(engine.schedule)
        sides.append(Side(name, engine, engine.schedule))
    return in_turns((sides[0], sides[1]), config, vocab, blocks, lambda *_: heard(), alike=False)
