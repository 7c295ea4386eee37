"""The weights of a decoder, taken from a folder into the forms that its layers multiply with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megacpt.convert.families.features import ANY, reasons
from megacpt.errors import CheckpointError, ConfigError
from megacpt.quant.matrix import Quantised
from megacpt.serve.linear import Activations, Linear, dense_linear, quantised_linear

if TYPE_CHECKING:
    from megacpt.config import ModelConfig

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head", "model.norm.weight"


class Source(Protocol):
    """Where weights come from, under Hugging Face's names; `convert.packed_folder.PackedFolder` is one."""

    @property
    def model(self) -> ModelConfig:
        """The network."""

    def names(self) -> Iterable[str]:
        """The names of all matrices and vectors, such as ``model.layers.0.mlp.up_proj.weight``."""

    def is_quantised(self, name: str) -> bool:
        """Whether a matrix is stored as codes and scales."""

    def tensor(self, name: str) -> Tensor:
        """One that is stored as it is."""

    def quantised(self, name: str) -> Quantised:
        """One that is stored as codes and scales."""


@dataclass(frozen=True)
class Layer:
    """The weights of a decoder layer; g key/value heads, h query heads of d dims, f inner dims of the MLP.

    Attributes:
        attention_norm: [H].
        qkv: to [T, (h + 2 g) d]: queries, keys, values.
        query_norm: [d]; None without `model.qk_norm`, as `key_norm`.
        key_norm: [d].
        output: from [T, h d].
        mlp_norm: [H].
        gate_up: to [T, 2 f], the gate first.
        down: from [T, f].
    """

    attention_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Loader:
    """Takes the weights of a source, and says what is wrong with them.

    Args:
        source: where they come from.
        activations: of the packed layers.
        device: where they go.
        dtype: of all activations.

    Raises:
        ConfigError: the network is one that this decoder does not run.
    """

    def __init__(self, source: Source, activations: Activations, device: torch.device, dtype: torch.dtype) -> None:
        check_runs(source.model)
        self._source, self._activations = source, activations
        self._device, self._dtype = device, dtype
        self._names = set(source.names())

    def vector(self, name: str, size: int) -> Tensor:
        """A norm's weight or a bias, [size] in the dtype of the activations."""
        found = self._get(name).to(self._device, self._dtype)
        self._check(name, found.shape, (size,))
        return found

    def matrix(self, name: str, columns: int) -> Tensor:
        """A matrix that is stored as it is, [o, columns], in its own dtype; in that of activations of 16 bits."""
        found = self._get(name)
        found = found.to(self._device, found.dtype if self._dtype is torch.float32 else self._dtype)
        self._check(name, found.shape, (found.shape[0], columns))
        return found

    def linear(self, prefixes: Sequence[str], rows: Sequence[int], columns: int) -> Linear:
        """One layer of the matrices ``PREFIX.weight``, [rows, columns] each, below each other."""
        names = [f"{prefix}.weight" for prefix in prefixes]
        for name in names:
            self._present(name)
        bias = self._bias(prefixes, rows)
        if not any(map(self._source.is_quantised, names)):
            matrices = [self.matrix(name, columns) for name in names]
            for name, matrix, size in zip(names, matrices, rows, strict=True):
                self._check(name, matrix.shape, (size, columns))
            return dense_linear(torch.cat(matrices), self._dtype, bias)
        parts = [self._source.quantised(name) for name in names]
        for name, part, size in zip(names, parts, rows, strict=True):
            self._check(name, part.codes.shape, (size, columns))
        return quantised_linear(parts, self._activations, self._device, self._dtype, bias)

    def layer(self, index: int) -> Layer:
        """The weights of layer `index`."""
        model, name = self._source.model, f"model.layers.{index}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
        head_norms = [
            self.vector(f"{attention}.{part}_norm.weight", model.head_dim) if model.qk_norm else None for part in "qk"
        ]
        projections = [f"{attention}.{part}_proj" for part in "qkv"]
        return Layer(
            attention_norm=self.vector(f"{name}.input_layernorm.weight", model.hidden),
            qkv=self.linear(projections, [query, key, key], model.hidden),
            query_norm=head_norms[0],
            key_norm=head_norms[1],
            output=self.linear([f"{attention}.o_proj"], [model.hidden], query),
            mlp_norm=self.vector(f"{name}.post_attention_layernorm.weight", model.hidden),
            gate_up=self.linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"], [model.ffn, model.ffn], model.hidden),
            down=self.linear([f"{mlp}.down_proj"], [model.hidden], model.ffn),
        )

    def _bias(self, prefixes: Sequence[str], rows: Sequence[int]) -> Tensor | None:
        names = [f"{prefix}.bias" for prefix in prefixes]
        if not any(name in self._names for name in names):
            return None
        return torch.cat([self.vector(name, size) for name, size in zip(names, rows, strict=True)])

    def _get(self, name: str) -> Tensor:
        self._present(name)
        return self._source.tensor(name)

    def _present(self, name: str) -> None:
        if name not in self._names:
            raise CheckpointError(f"the folder has no {name}, which its config.json asks for: write it again")

    @staticmethod
    def _check(name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
        if tuple(found) != tuple(wanted):
            raise CheckpointError(
                f"{name} is {list(found)}, and by config.json should be {list(wanted)}: one of the two is of another "
                "model"
            )


def check_runs(model: ModelConfig) -> None:
    """Refuse a network that `Decoder` has no code for.

    Raises:
        ConfigError: it has experts, another activation than SwiGLU, or another order of things than a Llama.
    """
    if model.moe is not None:
        raise ConfigError("model.moe: experts are not decoded from a packed folder; generate from the checkpoint")
    if model.activation != "swiglu":
        raise ConfigError(f"model.activation: {model.activation} is not decoded from a folder, only swiglu")
    decoded = {"qk_norm": (False, True), "bias": (False, True), "qkv_bias": (False, True), "rope.share": (ANY,)}
    found = list(reasons(model, "the decoder of folders", decoded))
    if found:
        raise ConfigError("\n".join([*found, "generate from the checkpoint"]))
