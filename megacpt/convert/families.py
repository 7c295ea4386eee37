"""Families of models as Hugging Face names them: which of our tensors their tensors are parts of.

A family is a table. One of our matrices often is several of theirs below each other (Megatron fuses queries, keys and
values, group by group, and the gate with the second projection); rows of ours are then chosen by number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from megacpt.errors import ConfigError

if TYPE_CHECKING:
    from megacpt.config import ModelConfig

Rows = Literal["all", "query", "key", "value", "gate", "up"]
Kind = Literal["attention", "mlp", "other"]


@dataclass(frozen=True)
class Target:
    """A tensor of the family.

    Attributes:
        name: as in its files.
        shape: [rows, columns], or [rows].
        rows: which rows of our tensor it is.
    """

    name: str
    shape: tuple[int, ...]
    rows: Rows


@dataclass(frozen=True)
class Source:
    """A tensor of ours, and those of the family that are its rows.

    Attributes:
        name: in a checkpoint.
        layer: its index along the leading dim of the stored tensor; None for one that is not of a layer.
        shape: without the leading dim.
        kind: which of `model.quantise.parts` it belongs to; ``other`` is never quantised.
        split_dim: the dim that tensor parallelism cuts.
        halves: 2 for a gated first matrix, gate above the second projection.
        targets: in the order in which they are written.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    kind: Kind
    split_dim: Literal[0, 1]
    halves: int
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Entry:
    """A line of a family's table, for each layer: our name, and theirs with the rows that each is.

    Attributes:
        ours: behind ``decoder.layers.``, without ``.weight`` or ``.bias``.
        theirs: behind the layer's prefix, likewise.
        kind: see `Source`, as `split_dim`.
        split_dim: see there.
        columns: width of the matrix; None for a vector.
        biased: whether the model has a bias beside the matrix.
        present: whether the model has the tensor at all.
    """

    ours: str
    theirs: tuple[tuple[str, Rows], ...]
    kind: Kind = "other"
    split_dim: Literal[0, 1] = 0
    columns: Callable[[ModelConfig], int] | None = None
    biased: Callable[[ModelConfig], bool] = lambda _: False
    present: Callable[[ModelConfig], bool] = lambda _: True


@dataclass(frozen=True)
class Family:
    """How a family names its tensors.

    Attributes:
        name: ``model_type`` of its config.json.
        layer: prefix of a layer's tensors, with ``{}`` for its number.
        embedding: name of the input embedding.
        norm: name of the last norm.
        head: name of the output projection.
        entries: of a layer.
    """

    name: str
    layer: str
    embedding: str
    norm: str
    head: str
    entries: tuple[Entry, ...]

    def sources(self, model: ModelConfig, vocab: int, kept: int) -> Iterator[Source]:
        """Yield every tensor of a model with what becomes of it, embedding first and head last.

        Args:
            model: the network.
            vocab: rows of the embedding and of the head in the checkpoint.
            kept: how many of them are written; those behind only pad the vocabulary.
        """
        stored, written = (vocab, model.hidden), (kept, model.hidden)
        yield _alone("embedding.word_embeddings.weight", self.embedding, stored, written)
        for layer in range(model.layers):
            for entry in self.entries:
                yield from self._layer(model, layer, entry)
        yield _alone("decoder.final_layernorm.weight", self.norm, (model.hidden,), (model.hidden,))
        if not model.tied_embeddings:
            yield _alone("output_layer.weight", self.head, stored, written)

    def _layer(self, model: ModelConfig, layer: int, entry: Entry) -> Iterator[Source]:
        if not entry.present(model):
            return
        total = sum(_rows(model, entry.ours, rows) for _, rows in entry.theirs)
        wide = () if entry.columns is None else (entry.columns(model),)
        halves = len(entry.theirs) if entry.theirs[0][1] == "gate" else 1
        for word in ("weight", "bias") if entry.biased(model) else ("weight",):
            beyond = wide if word == "weight" else ()
            prefix = self.layer.format(layer)
            targets = tuple(
                Target(f"{prefix}.{name}.{word}", (_rows(model, entry.ours, rows), *beyond), rows)
                for name, rows in entry.theirs
            )
            kind: Kind = entry.kind if word == "weight" else "other"
            name, shape = f"decoder.layers.{entry.ours}.{word}", (total, *beyond)
            yield Source(name, layer, shape, kind, entry.split_dim, halves, targets)


def _alone(ours: str, theirs: str, stored: tuple[int, ...], written: tuple[int, ...]) -> Source:
    return Source(ours, None, stored, "other", 0, 1, (Target(f"{theirs}.weight", written, "all"),))


def _rows(model: ModelConfig, ours: str, rows: Rows) -> int:
    """How many rows a part has."""
    if rows in ("gate", "up"):
        return model.ffn
    if rows == "query":
        return model.heads * model.head_dim
    if rows in ("key", "value"):
        return model.kv_heads * model.head_dim
    return model.head_dim if ours.endswith(("q_layernorm", "k_layernorm")) else model.hidden


def row_numbers(model: ModelConfig, rows: Rows) -> Tensor | None:
    """Return which rows of our tensor a part is, [its rows] int64 in its order; None for all.

    The fused matrix of attention has, for each group of heads that share keys and values, the rows of its query heads,
    then its key head's, then its value head's.
    """
    if rows == "all":
        return None
    if rows in ("gate", "up"):
        return torch.arange(model.ffn) + (model.ffn if rows == "up" else 0)
    shared = model.heads // model.kv_heads
    fused = torch.arange((model.heads + 2 * model.kv_heads) * model.head_dim)
    groups = fused.view(model.kv_heads, shared + 2, model.head_dim)
    parts = {"query": groups[:, :shared], "key": groups[:, shared], "value": groups[:, shared + 1]}
    return parts[rows].reshape(-1)


def _hidden(model: ModelConfig) -> int:
    return model.hidden


def _all_biases(model: ModelConfig) -> bool:
    return model.bias


def _qkv_biases(model: ModelConfig) -> bool:
    return model.bias or model.qkv_bias


def _head_norms(model: ModelConfig) -> bool:
    return model.qk_norm


LLAMA = Family(
    name="llama",
    layer="model.layers.{}",
    embedding="model.embed_tokens",
    norm="model.norm",
    head="lm_head",
    entries=(
        Entry("input_layernorm", (("input_layernorm", "all"),)),
        Entry(
            "self_attention.linear_qkv",
            (("self_attn.q_proj", "query"), ("self_attn.k_proj", "key"), ("self_attn.v_proj", "value")),
            "attention",
            columns=_hidden,
            biased=_qkv_biases,
        ),
        Entry("self_attention.q_layernorm", (("self_attn.q_norm", "all"),), present=_head_norms),
        Entry("self_attention.k_layernorm", (("self_attn.k_norm", "all"),), present=_head_norms),
        Entry(
            "self_attention.linear_proj",
            (("self_attn.o_proj", "all"),),
            "attention",
            split_dim=1,
            columns=lambda model: model.heads * model.head_dim,
            biased=_all_biases,
        ),
        Entry("pre_mlp_layernorm", (("post_attention_layernorm", "all"),)),
        Entry(
            "mlp.linear_fc1",
            (("mlp.gate_proj", "gate"), ("mlp.up_proj", "up")),
            "mlp",
            columns=_hidden,
            biased=_all_biases,
        ),
        Entry(
            "mlp.linear_fc2",
            (("mlp.down_proj", "all"),),
            "mlp",
            split_dim=1,
            columns=lambda model: model.ffn,
            biased=_all_biases,
        ),
    ),
)


def check_names(model: ModelConfig) -> None:
    """Refuse a network whose tensors `LLAMA` has no names for.

    Raises:
        ConfigError: it has experts, or an MLP without a gate.
    """
    if model.moe is not None:
        raise ConfigError(
            "model.moe: packing, rounding, counting and exports know the matrices of a Llama, which has no experts; "
            "such a model is trained, evaluated and averaged, and generates from its checkpoint"
        )
    if not model.gated:
        raise ConfigError(
            f"model.activation: {model.activation} has no gate, and packing, rounding, counting and exports know the "
            "matrices of a Llama, whose MLP has one"
        )


def check_llama(model: ModelConfig) -> None:
    """Refuse a network that is no Llama, naming every reason.

    Raises:
        ConfigError: the key, and why transformers' Llama cannot compute it.
    """
    check_names(model)
    reasons = []
    if model.qk_norm:
        reasons.append("model.qk_norm: a Llama does not normalise queries and keys")
    if model.rope.share != 1:
        reasons.append(f"model.rope.share: a Llama rotates all dimensions of a head, not {model.rope.share:g} of them")
    if model.qkv_bias and not model.bias:
        reasons.append(
            "model.qkv_bias: a Llama with biases on queries, keys and values has one on the output of attention too"
        )
    if reasons:
        raise ConfigError("this model is no Llama:\n" + "\n".join(reasons))


def llama_config(model: ModelConfig, vocab: int, eod: int, dtype: str) -> dict[str, Any]:
    """Return config.json of a model.

    Args:
        model: the network.
        vocab: rows of the embedding that is written.
        eod: the id that ends a document.
        dtype: of the weights that are written.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": LLAMA.name,
        "vocab_size": vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": {"swiglu": "silu", "geglu": "gelu"}[model.activation],
        "max_position_embeddings": model.max_seq_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope.base,
        "rope_scaling": _rope_scaling(model),
        "attention_bias": model.bias or model.qkv_bias,
        "mlp_bias": model.bias,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "bos_token_id": None,
        "eos_token_id": eod,
        "pad_token_id": None,
        "torch_dtype": dtype,
    }


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    scaling = model.rope.scaling
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
    }
