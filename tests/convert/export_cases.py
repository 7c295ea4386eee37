"""What the ranks of a pool run: exports of checkpoints, and what a checkpoint computes itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megacpt.checkpoint.pieces import Piece, PieceReader
from megacpt.config import ModelConfig, load_run
from megacpt.continuation.opened import open_model
from megacpt.convert.bits import bits_of_checkpoint
from megacpt.convert.from_hf import from_hf
from megacpt.convert.pack import pack
from megacpt.convert.packed_folder import PackedFolder
from megacpt.convert.round_to_nearest import round_to_nearest
from megacpt.convert.to_gguf import to_gguf
from megacpt.convert.to_hf import to_hf
from megacpt.errors import MegacptError
from megacpt.evaluate.generation import cached_model, generate
from megacpt.quant.matrix import quantise_matrix

OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "pack": pack,
    "from_hf": from_hf,
    "to_hf": to_hf,
    "to_gguf": to_gguf,
    "round_to_nearest": round_to_nearest,
}
MATRICES = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


def export(operation: str, checkpoint: str, out: str, **options: Any) -> tuple[str, str] | None:
    """Write an export; return kind and text of the error, if there is one."""
    try:
        OPERATIONS[operation](Path(checkpoint), Path(out), **options)
    except MegacptError as error:
        return type(error).__name__, str(error)
    return None


def plain_weights(checkpoint: str) -> dict[str, np.ndarray]:
    """Every tensor of a Llama by Hugging Face's name, quantised ones dense; taken apart by views of Megatron's."""
    found = {}
    for name, tensor in _plain(Path(checkpoint)).items():
        found[name] = tensor.numpy()
    return found


def _plain(checkpoint: Path) -> dict[str, Tensor]:
    reader, model = PieceReader(checkpoint), load_run(checkpoint / "run.yaml").model
    whole = {name: _whole(reader, name, shape) for name, shape in reader.shapes().items()}
    found = {
        "model.embed_tokens.weight": whole["embedding.word_embeddings.weight"],
        "model.norm.weight": whole["decoder.final_layernorm.weight"],
    }
    if not model.tied_embeddings:
        found["lm_head.weight"] = whole["output_layer.weight"]
    for layer in range(model.layers):
        for name, tensor in whole.items():
            if name.startswith("decoder.layers."):
                found.update(_of_layer(model, layer, name.removeprefix("decoder.layers."), tensor[layer]))
    return found


def _of_layer(model: ModelConfig, layer: int, name: str, tensor: Tensor) -> dict[str, Tensor]:
    stem, _, word = name.rpartition(".")
    prefix = f"model.layers.{layer}"
    short = stem.rpartition(".")[2]
    part = "attention" if stem.startswith("self_attention") else "mlp"
    if model.quantise is not None and part in model.quantise.parts and name.endswith(MATRICES):
        first = short in ("linear_qkv", "linear_fc1")
        halves = 2 if short == "linear_fc1" else 1
        tensor = quantise_matrix(tensor, model.quantise, 0 if first else 1, halves).dense()
    if short == "linear_qkv":
        queries = model.heads // model.kv_heads
        groups = tensor.view(model.kv_heads, queries + 2, model.head_dim, *tensor.shape[1:])
        parts = {"q": groups[:, :queries], "k": groups[:, queries], "v": groups[:, queries + 1]}
        return {
            f"{prefix}.self_attn.{part}_proj.{word}": rows.reshape(-1, *tensor.shape[1:])
            for part, rows in parts.items()
        }
    if short == "linear_fc1":
        gate, up = tensor.chunk(2)
        return {f"{prefix}.mlp.gate_proj.{word}": gate, f"{prefix}.mlp.up_proj.{word}": up}
    names = {
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "linear_proj": "self_attn.o_proj",
        "linear_fc2": "mlp.down_proj",
    }
    return {f"{prefix}.{names[short]}.{word}": tensor}


def _whole(reader: PieceReader, name: str, shape: tuple[int, ...]) -> Tensor:
    return reader.read(Piece(name, (0,) * len(shape), shape, shape, torch.float32))


def used_weights(checkpoint: str) -> dict[str, np.ndarray]:
    """The matrices that the engine multiplies with, of those that are not fused with others."""
    engine, _, _ = open_model(Path(checkpoint))
    found = {}
    for number, layer in enumerate(engine.chunks[0].decoder.layers):
        prefix = f"model.layers.{number}"
        parts = {
            "self_attn.o_proj": layer.self_attention.linear_proj,
            "mlp.down_proj": layer.mlp.linear_fc2,
            "mlp.gate_proj": layer.mlp.linear_fc1,
        }
        for name, module in parts.items():
            with torch.no_grad(), module.quantiser.matrix() as matrix:
                rows = matrix.chunk(2)[0] if "gate" in name else matrix
                found[f"{prefix}.{name}.weight"] = rows.float().numpy().copy()
    return found


def logits(checkpoint: str, tokens: list[int]) -> np.ndarray:
    """Logits after each token, [tokens, V], of the engine."""
    engine, tokenizer, _ = open_model(Path(checkpoint))
    with cached_model(engine, len(tokens)) as feed:
        return torch.stack([feed([token])[: tokenizer.vocab_size] for token in tokens]).numpy()


def continued(checkpoint: str, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The likeliest tokens behind each prompt, as ``megacpt generate`` takes them."""
    engine, tokenizer, _ = open_model(Path(checkpoint))
    return [generate(engine, prompt, count, vocab_size=tokenizer.vocab_size) for prompt in prompts]


def packed_weights(folder: str) -> dict[str, np.ndarray]:
    """Every tensor of a packed folder, dense."""
    packed = PackedFolder(Path(folder))
    return {
        name: (packed.quantised(name).dense() if packed.is_quantised(name) else packed.tensor(name)).float().numpy()
        for name in packed.names()
    }


def checkpoint_bits(checkpoint: str, ternary: float) -> float:
    """Bits of a checkpoint in all."""
    return sum(one.bits for one in bits_of_checkpoint(Path(checkpoint), ternary=ternary))
