"""A checkpoint of Hugging Face's Llama from a checkpoint: plain weights, which every program reads."""

from __future__ import annotations

import json
from pathlib import Path

from megacpt.continuation.ledger import LEDGER
from megacpt.convert.families import check_llama, llama_config
from megacpt.convert.packed_folder import CONFIG
from megacpt.convert.safetensors_writer import SHARD_BYTES, Planned, new_folder
from megacpt.convert.tokenizer_files import tokenizer_files
from megacpt.convert.weights import DTYPES, ModelWeights, Progress, warn_of_activations
from megacpt.quant.matrix import Quantised


def to_hf(
    checkpoint: Path,
    out: Path,
    dtype: str | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint as transformers' ``LlamaForCausalLM`` loads it, one matrix at a time.

    Quantised matrices are written as the products of their codes and scales. Rows of embedding and head that only pad
    the vocabulary are left out, so that no program can choose them.

    Args:
        checkpoint: a checkpoint, or a run folder for its newest.
        out: a new folder.
        dtype: of the weights; None for what the run computes in.
        progress: see `ModelWeights.tensors`.
        shard_bytes: of a file at most.

    Raises:
        ConfigError: the model is no Llama, with the keys that say so; `out` exists.
        CheckpointError: the checkpoint is damaged, or the disk fails.
    """
    weights = ModelWeights(checkpoint)
    check_llama(weights.model)
    warn_of_activations(weights)
    plain = weights.precision if dtype is None else DTYPES[dtype]
    sources = weights.sources(padded=False)
    plan = [Planned(target.name, plain, target.shape) for source in sources for target in source.targets]
    config = llama_config(weights.model, weights.words, weights.tokenizer.eod, str(plain).removeprefix("torch."))
    _, tokenizer = tokenizer_files(weights.tokenizer)
    texts = {CONFIG: json.dumps(config, indent=2) + "\n", LEDGER: weights.ledger.to_json()}
    with new_folder(out, plan, texts, tokenizer, shard_bytes) as folder:
        for _, target, found in weights.tensors(sources, progress):
            folder.write(target.name, found.dense(plain) if isinstance(found, Quantised) else found)
