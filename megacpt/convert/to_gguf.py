"""A GGUF file from a checkpoint, for llama.cpp: ternary matrices as TQ1_0 or TQ2_0, all others in 16 or 32 bits.

A block of TQ1_0 (1.6875 bits a weight) or TQ2_0 (2.0625) has 256 weights of a row and a scale in float16.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megacpt.convert.families import Source, Target, check_llama
from megacpt.convert.gguf_file import GGUFFile, GGUFTensor, gguf_package
from megacpt.convert.gguf_vocab import add_vocabulary
from megacpt.convert.output import appearing
from megacpt.convert.weights import ModelWeights, Progress, Weights, scale_shape, warn_of_activations
from megacpt.errors import ConfigError
from megacpt.model.rope import scale_frequencies
from megacpt.quant.matrix import Quantised

log = logging.getLogger(__name__)
BLOCK = 256
_FILE_TYPES = {"tq2_0": "MOSTLY_TQ2_0", "tq1_0": "MOSTLY_TQ1_0", "f16": "MOSTLY_F16", "f32": "ALL_F32"}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_CHUNK = 1 << 19  # numbers that are converted at a time


def to_gguf(
    checkpoint: Path, out: Path, kind: str | None = None, plain: str = "f16", progress: Progress | None = None
) -> None:
    """Write a checkpoint as a GGUF file of the architecture ``llama``, one matrix at a time.

    Rows that only pad the vocabulary are left out, so that no program can choose them.

    Args:
        checkpoint: a checkpoint, or a run folder for its newest.
        out: a new file.
        kind: of the matrices of attention and MLPs: ``tq2_0``, ``tq1_0``, ``f16`` or ``f32``; None for ``tq2_0`` where
            they are ternary, and ``f16`` elsewhere.
        plain: of embedding and head: ``f16`` or ``f32``.
        progress: see `ModelWeights.tensors`.

    Raises:
        SetupError: the package gguf is missing.
        ConfigError: the model is no Llama, or not ternary with a ternary type; `out` exists.
        CheckpointError: the checkpoint is damaged, or the disk fails.
    """
    gguf_package()
    write_gguf(ModelWeights(checkpoint), out, kind, plain, progress)


def write_gguf(
    weights: Weights, out: Path, kind: str | None = None, plain: str = "f16", progress: Progress | None = None
) -> None:
    """Write weights as `to_gguf` does those of a checkpoint."""
    gguf = gguf_package()
    check_llama(weights.model)
    if weights.model.activation != "swiglu":
        text = f"model.activation: llama.cpp's Llama computes swiglu, and this model {weights.model.activation}"
        raise ConfigError(text)
    if weights.model.rope.scaling is not None and weights.model.rope.scaling.kind == "yarn":
        raise ConfigError("model.rope.scaling.kind: yarn is not written to GGUF files: take linear or llama3")
    warn_of_activations(weights)
    kind = _checked_kind(weights, kind)
    sources = weights.sources(padded=False)
    plan = [_planned(weights, source, target, kind, plain) for source in sources for target in source.targets]
    _say_what_falls_back(plan, kind)
    factors = _rope_factors(weights)
    first = [] if factors is None else [GGUFTensor("rope_freqs.weight", tuple(factors.shape), "F32")]
    with appearing(out) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        _describe(gguf, writer, weights, kind)
        add_vocabulary(writer, weights.tokenizer, weights.words)
        file = GGUFFile(temporary, writer, [*first, *plan])
        if factors is not None:
            file.write([factors.numpy()])
        changed = 0.0
        for _, target, found in weights.tensors(sources, progress):
            file.write(_parts(found, _row_order(weights, target)))
            if isinstance(found, Quantised) and kind != "f32":
                changed = max(changed, _change_of_scales(found))
        file.finish()
    if changed > 0:
        log.warning(
            "scales of quantised matrices are not whole numbers of float16, which GGUF keeps them in: they change by "
            "up to %.2g of themselves. A model trained with model.quantise.scale.format: float16 keeps its function",
            changed,
        )


def _checked_kind(weights: Weights, kind: str | None) -> str:
    """The type of the matrices, if the model can have it."""
    grid = weights.quantise
    ternary = grid is not None and grid.grid in ("ternary", "binary")
    if kind is None:
        return "tq2_0" if ternary else "f16"
    if kind.startswith("tq") and not ternary:
        what = "float" if grid is None else f"on the grid {grid.grid}"
        raise ConfigError(f"--type {kind} is for ternary matrices, and those of this model are {what}: take f16")
    return kind


def _planned(weights: Weights, source: Source, target: Target, kind: str, plain: str) -> GGUFTensor:
    """The name and type of a tensor; a matrix whose rows or scales fit no ternary blocks becomes F16."""
    if len(target.shape) == 1:
        form = "f32"
    elif source.kind == "other":
        form = plain
    else:
        form = "f16" if kind.startswith("tq") and not _fits_blocks(weights, source, target) else kind
    return GGUFTensor(_name(target.name), target.shape, form.upper())


def _fits_blocks(weights: Weights, source: Source, target: Target) -> bool:
    """Whether each block of 256 weights of a row is whole and has one scale."""
    config = weights.quantise
    if config is None or not weights.is_quantised(source):
        return False
    return target.shape[1] // scale_shape(target, source, config)[1] % BLOCK == 0


def _say_what_falls_back(plan: list[GGUFTensor], kind: str) -> None:
    fallen = [one for one in plan if one.type == "F16" and one.name.startswith("blk.")]
    if kind.startswith("tq") and fallen:
        log.warning(
            "%d matrices are written as F16, %s (%d columns) among them: a block of %s is %d weights of a row under "
            "one scale, and their rows are no whole blocks, or not ternary",
            len(fallen),
            fallen[0].name,
            fallen[0].shape[1],
            kind.upper(),
            BLOCK,
        )


def _name(name: str) -> str:
    """GGUF's name of a tensor of Hugging Face's Llama."""
    stem, _, word = name.rpartition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{word}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.{word}"


def _describe(gguf: Any, writer: Any, weights: Weights, kind: str) -> None:
    """Write the sizes of the model."""
    model = weights.model
    writer.add_name(weights.name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(weights.words)
    writer.add_context_length(model.max_seq_length)
    writer.add_embedding_length(model.hidden)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.ffn)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_dimension_count(model.rotary_dim)
    writer.add_rope_freq_base(model.rope.base)
    if model.rope.scaling is not None and model.rope.scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope.scaling.factor)


def _rope_factors(weights: Weights) -> Tensor | None:
    """By what llama.cpp divides the rotary frequencies, [d/2] float32, where Llama 3's scaling is used."""
    rope = weights.model.rope
    if rope.scaling is None or rope.scaling.kind != "llama3":
        return None
    steps = torch.arange(0, weights.model.rotary_dim, 2, dtype=torch.float64) / weights.model.rotary_dim
    frequencies = rope.base**-steps
    return (frequencies / scale_frequencies(frequencies, rope)).float()


def _row_order(weights: Weights, target: Target) -> Tensor:
    """In which order rows are written: llama.cpp's rotation pairs neighbours, ours the two halves of a head."""
    rows = torch.arange(target.shape[0])
    heads = {"query": weights.model.heads, "key": weights.model.kv_heads}.get(target.rows.name)
    return rows if heads is None else rows.view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _parts(found: Tensor | Quantised, order: Tensor) -> Iterator[np.ndarray[Any, Any]]:
    """The rows of a tensor in an order, some at a time, in float32."""
    width = (found.codes if isinstance(found, Quantised) else found)[0].numel()
    for rows in order.split(max(1, _CHUNK // width)):
        if isinstance(found, Tensor):
            yield found[rows].float().numpy()
        else:
            blocks = rows // (len(found.codes) // len(found.scales))
            yield Quantised(found.codes[rows], found.scales[blocks], found.transform).dense().numpy()


def _change_of_scales(found: Quantised) -> float:
    """The largest relative change of a scale that is rounded to float16."""
    kept = found.scales.half().float()
    return float(((kept - found.scales).abs() / found.scales.abs().clamp(min=1e-30)).max())
