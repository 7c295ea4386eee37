"""A model of Hugging Face from a checkpoint: plain weights, which every program reads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from megacpt.config import ModelConfig
from megacpt.continuation.ledger import LEDGER, Ledger
from megacpt.convert.adopt import family_of
from megacpt.convert.families import FAMILIES, Family
from megacpt.convert.families.settings import common_config
from megacpt.convert.packed_folder import CONFIG
from megacpt.convert.safetensors_writer import SHARD_BYTES, Planned, new_folder
from megacpt.convert.tokenizer_files import tokenizer_files
from megacpt.convert.weights import DTYPES, ModelWeights, Progress, warn_of_activations
from megacpt.errors import ConfigError, nearest
from megacpt.quant.matrix import Quantised


def to_hf(
    checkpoint: Path,
    out: Path,
    dtype: str | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
    family: str | None = None,
) -> None:
    """Write a checkpoint as transformers loads it, one matrix at a time.

    Quantised matrices are written as the products of their codes and scales. Rows of embedding and head that only pad
    the vocabulary are left out, so that no program can choose them.

    Args:
        checkpoint: a checkpoint, or a run folder for its newest.
        out: a new folder.
        dtype: of the weights; None for what the run computes in.
        progress: see `ModelWeights.tensors`.
        shard_bytes: of a file at most.
        family: a name of `FAMILIES`; None for the one that the lineage began with, or else the first that has all that
            the model has.

    Raises:
        ConfigError: the model is none of the family, with the keys that say so; `out` exists.
        CheckpointError: the checkpoint is damaged, or the disk fails.
    """
    weights = ModelWeights(checkpoint, partial(chosen_family, name=family))
    warn_of_activations(weights)
    plain = weights.precision if dtype is None else DTYPES[dtype]
    sources = weights.sources(padded=False)
    plan = [
        Planned(target.name, torch.float32 if source.exact else plain, target.shape)
        for source in sources
        for target in source.targets
    ]
    named = str(plain).removeprefix("torch.")
    config = common_config(weights.family, weights.model, weights.words, weights.tokenizer.eod, named)
    _, tokenizer = tokenizer_files(weights.tokenizer)
    texts = {CONFIG: json.dumps(config, indent=2) + "\n", LEDGER: weights.ledger.to_json()}
    with new_folder(out, plan, texts, tokenizer, shard_bytes) as folder:
        for _, target, found in weights.tensors(sources, progress):
            folder.write(target.name, found.dense(plain) if isinstance(found, Quantised) else found)


def chosen_family(model: ModelConfig, ledger: Ledger, name: str | None = None) -> Family:
    """Return the family that a model is written as.

    Args:
        model: the network.
        ledger: of the checkpoint.
        name: of the family, if it is given.

    Raises:
        ConfigError: the network is none of it, or of none at all; with every key that says so.
    """
    if name is not None and name not in FAMILIES:
        raise ConfigError(f"--family {name}{nearest(name, FAMILIES)}: take one of {', '.join(FAMILIES)}")
    if name is not None:
        FAMILIES[name].check(model)
        return FAMILIES[name]
    began = FAMILIES.get(family_of(ledger) or "")
    if began is not None and not began.reasons(model):
        return began
    wrong = {family.title: family.reasons(model) for family in FAMILIES.values()}
    for family in FAMILIES.values():
        if not wrong[family.title]:
            return family
    closest = sorted(wrong.items(), key=lambda pair: len(pair[1]))[:3]
    lines = [f"{title}: {reason}" for title, reasons in closest for reason in reasons]
    raise ConfigError("no family has all that this model has; the nearest are\n" + "\n".join(lines))
