"""A decoder's step for one token as one call of the compiled CPU kernels; `serve.decoder` has the same in torch.

The number of threads changes no bit of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_double, c_int, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from megacpt.ops.native import library
from megacpt.ops.packed_linear_cpu import best_variant
from megacpt.ops.packed_matrix import PackedMatrix
from megacpt.ops.tensors import FORMATS

_PACKED = 3


class _Matrix(Structure):
    """`Matrix` of kernels/cpu/decode.cpp, as those below are the structures of their names there."""

    _fields_ = (
        *((name, c_void_p) for name in ("data", "scales", "bias")),
        *((name, c_int64) for name in ("rows", "columns", "blocks", "format")),
    )


class _Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "query_norm", "key_norm", "mlp_norm")),
        *((name, _Matrix) for name in ("qkv", "output", "gate_up", "down")),
    )


class _Model(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("layers", "hidden", "heads", "groups", "width", "inner", "rotated", "int8")),
        ("epsilon", c_double),
        ("layer", POINTER(_Layer)),
        *((name, c_void_p) for name in ("final_norm", "cosines", "sines")),
        *((name, _Matrix) for name in ("embedding", "head")),
    )


class _Token(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("id", "position", "capacity")),
        *((name, c_void_p) for name in ("keys", "values", "logits")),
    )


@dataclass(frozen=True)
class DecodeMatrix:
    """A matrix and its bias.

    Attributes:
        weight: packed, or [o, i] float32, bfloat16 or float16.
        bias: [o] float32, if there is one.
    """

    weight: PackedMatrix | Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class DecodeLayer:
    """The weights of a layer, with the names of `serve.weights.Layer`; norms are float32."""

    attention_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    mlp_norm: Tensor
    qkv: DecodeMatrix
    output: DecodeMatrix
    gate_up: DecodeMatrix
    down: DecodeMatrix


@dataclass(frozen=True)
class DecodeSizes:
    """The sizes of a model: query heads, key/value heads, dims of a head, inner dims of the MLP, rotated dims."""

    hidden: int
    heads: int
    groups: int
    width: int
    inner: int
    rotated: int
    epsilon: float


class DecodeStep:
    """A model whose next token is computed in one call.

    Args:
        sizes: of the model.
        layers: its layers.
        final_norm: [H] float32.
        embedding: [V, H] float32, bfloat16 or float16.
        head: to [V].
        cosines: [positions, rotated] float32, as `sines`, in which those of the first half are negative.
        sines: see `cosines`.
        int8: round the activations of packed matrices to 8 bits.
        isa: the instruction set to use, an index of `packed_linear_cpu.VARIANTS`; all give the same bits. None for the
            best.

    Raises:
        SetupError: the kernels can't be had; says why.
    """

    def __init__(
        self,
        sizes: DecodeSizes,
        layers: Sequence[DecodeLayer],
        final_norm: Tensor,
        embedding: Tensor,
        head: DecodeMatrix,
        cosines: Tensor,
        sines: Tensor,
        int8: bool,
        isa: int | None = None,
    ) -> None:
        self._held: list[object] = []  # what the structures point into
        self._decode = library().megacpt_decode
        self._decode.argtypes, self._decode.restype = [c_void_p, c_void_p, c_int, c_int], None
        self._isa = best_variant() if isa is None else isa
        self._rows = embedding.shape[0]
        array = (_Layer * len(layers))(*map(self._layer, layers))
        self._held.append(array)
        self._model = _Model(
            len(layers), sizes.hidden, sizes.heads, sizes.groups, sizes.width, sizes.inner, sizes.rotated, int8,
            sizes.epsilon, array, self._at(final_norm), self._at(cosines), self._at(sines),
            self._matrix(DecodeMatrix(embedding)), self._matrix(head),
        )  # fmt: skip

    def __call__(self, token: int, position: int, keys: Tensor, values: Tensor) -> Tensor:
        """Read `token` at `position`; the logits after it, [V] float32.

        Args:
            token: its id.
            position: where it stands, below the capacity of the cache.
            keys: [layers, g, capacity, d] float32, filled up to `position`; receives those of the token.
            values: the same.
        """
        if not 0 <= token < self._rows or not 0 <= position < keys.shape[2]:
            raise IndexError(f"token {token} of {self._rows} at position {position} of {keys.shape[2]}")
        logits = torch.empty(self._model.head.rows)
        state = _Token(token, position, keys.shape[2], keys.data_ptr(), values.data_ptr(), logits.data_ptr())
        self._decode(byref(self._model), byref(state), torch.get_num_threads(), self._isa)
        return logits

    def _layer(self, layer: DecodeLayer) -> _Layer:
        norms = (layer.attention_norm, layer.query_norm, layer.key_norm, layer.mlp_norm)
        matrices = (layer.qkv, layer.output, layer.gate_up, layer.down)
        return _Layer(*map(self._at, norms), *map(self._matrix, matrices))

    def _matrix(self, matrix: DecodeMatrix) -> _Matrix:
        weight, bias = matrix.weight, self._at(matrix.bias)
        if isinstance(weight, PackedMatrix):
            data, scales = self._at(weight.data), self._at(weight.scales)
            return _Matrix(data, scales, bias, weight.o, weight.i, weight.scales.shape[1], _PACKED)
        return _Matrix(self._at(weight), None, bias, *weight.shape, 1, FORMATS[weight.dtype])

    def _at(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        self._held.append(tensor)
        return tensor.data_ptr()
