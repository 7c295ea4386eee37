"""A packed folder from a checkpoint: codes in bytes, their scales, and all other weights as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megacpt.continuation.ledger import LEDGER
from megacpt.convert.families import Source, llama_config
from megacpt.convert.packed_folder import CONFIG, METHOD, PACKED, SCALE
from megacpt.convert.packed_format import PackedFormat, format_of
from megacpt.convert.safetensors_writer import SHARD_BYTES, Planned, new_folder
from megacpt.convert.tokenizer_files import tokenizer_files
from megacpt.convert.weights import DTYPES, ModelWeights, Progress, scale_shape
from megacpt.errors import ConfigError
from megacpt.quant.matrix import Quantised
from megacpt.quant.scales import FORMATS as SCALE_FORMATS


def pack(
    checkpoint: Path,
    out: Path,
    bits: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the weights of a checkpoint as a packed folder, one matrix at a time.

    Args:
        checkpoint: a checkpoint with quantised matrices, or a run folder for its newest.
        out: a new folder.
        bits: of a ternary code: ``2`` (the default) or ``1.6``.
        dtype: of the weights that are not quantised; None for what the run computes in.
        progress: see `ModelWeights.tensors`.
        shard_bytes: of a file at most.

    Raises:
        ConfigError: the model has nothing to pack, or no packed form; `out` exists.
        CheckpointError: the checkpoint is damaged, or the disk fails.
    """
    weights = ModelWeights(checkpoint)
    if weights.quantise is None:
        raise ConfigError(
            f"{weights.folder} has no quantised matrices (model.quantise: null), so that there is nothing to pack: "
            "round them with `megacpt convert quantise`, or write it as it is with `megacpt convert to-hf`"
        )
    form = format_of(weights.quantise, bits)
    plain = weights.precision if dtype is None else DTYPES[dtype]
    sources = weights.sources(padded=True)
    plan = [planned for source in sources for planned in _planned(weights, source, form, plain)]
    file, tokenizer = tokenizer_files(weights.tokenizer)
    config = json.dumps(_config(weights, form, plain, file), indent=2) + "\n"
    texts = {CONFIG: config, LEDGER: weights.ledger.to_json()}
    with new_folder(out, plan, texts, tokenizer, shard_bytes) as folder:
        for _, target, found in weights.tensors(sources, progress):
            if isinstance(found, Quantised):
                folder.write(target.name + PACKED, form.pack(found.codes))
                folder.write(target.name + SCALE, found.scales)
            else:
                folder.write(target.name, found)


def _planned(weights: ModelWeights, source: Source, form: PackedFormat, plain: torch.dtype) -> list[Planned]:
    """What is written of a source."""
    config = weights.quantise
    if config is None or not weights.is_quantised(source):
        return [Planned(target.name, plain, target.shape) for target in source.targets]
    found = []
    for target in source.targets:
        rows, columns = target.shape
        found.append(Planned(target.name + PACKED, torch.uint8, (rows, form.row_bytes(columns))))
        scale = SCALE_FORMATS[config.scale.format]
        found.append(Planned(target.name + SCALE, scale, scale_shape(target, source, config)))
    return found


def _config(weights: ModelWeights, form: PackedFormat, plain: torch.dtype, file: str | None) -> dict[str, Any]:
    """Content of config.json: a Llama's, how it is packed, and the model as megacpt describes it."""
    assert weights.quantise is not None
    name = str(plain).removeprefix("torch.")
    activations = weights.quantise.activations
    return {
        **llama_config(weights.model, weights.vocab, weights.tokenizer.eod, name),
        "quantization_config": {
            "quant_method": METHOD,
            "format": form.name,
            "activations": None if activations == "none" else activations,
            "scale": weights.quantise.scale.model_dump(mode="json"),
            "parts": list(weights.quantise.parts),
        },
        METHOD: {
            "model": weights.model.model_dump(mode="json"),
            "tokenizer": {**weights.ledger.tokenizer, "spec": file or "bytes", "file": file},
            "checkpoint": weights.ledger.id,
        },
    }
