"""A decoder's weights handed to the compiled step, which computes a token in one call."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from megacpt.errors import SetupError
from megacpt.ops.decode_cpu import DecodeLayer, DecodeMatrix, DecodeSizes, DecodeStep
from megacpt.ops.dispatch import kernel_mode
from megacpt.serve.linear import Linear, PackedLinear
from megacpt.serve.weights import Layer

if TYPE_CHECKING:
    from megacpt.serve.decoder import Decoder

_log = logging.getLogger("megacpt.serve")


def native_step(decoder: Decoder) -> DecodeStep | None:
    """The compiled step of a decoder on the CPU; None where torch's operations run instead.

    Raises:
        SetupError: `MEGACPT_KERNELS` asks for kernels that can't be had.
    """
    mode = kernel_mode()
    if mode == "reference" or decoder.device.type != "cpu" or decoder.dtype is not torch.float32:
        return None
    try:
        return decode_step(decoder)
    except SetupError as missing:
        if mode == "native":
            raise
        _log.warning("decoding runs on torch, at some milliseconds a token more: %s", missing)
        return None


def decode_step(decoder: Decoder, isa: int | None = None) -> DecodeStep:
    """The compiled step of a decoder; `isa` is that of `DecodeStep`.

    Raises:
        SetupError: the kernels can't be had, or do not compute this; says why.
    """
    if decoder.activations == "fp8":
        raise SetupError("the compiled step has no activations in fp8; torch's operations, with packed products, do")
    model = decoder.model
    sizes = DecodeSizes(
        hidden=model.hidden,
        heads=model.heads,
        groups=model.kv_heads,
        width=model.head_dim,
        inner=model.ffn,
        rotated=model.rotary_dim,
        epsilon=model.norm_eps,
    )
    return DecodeStep(
        sizes,
        [_layer(layer) for layer in decoder.layers],
        decoder.final_norm,
        decoder.embedding,
        _matrix(decoder.head),
        decoder.rotary.cosines,
        decoder.rotary.sines,
        decoder.activations == "int8",
        isa,
    )


def _layer(layer: Layer) -> DecodeLayer:
    return DecodeLayer(
        attention_norm=layer.attention_norm,
        query_norm=layer.query_norm,
        key_norm=layer.key_norm,
        mlp_norm=layer.mlp_norm,
        qkv=_matrix(layer.qkv),
        output=_matrix(layer.output),
        gate_up=_matrix(layer.gate_up),
        down=_matrix(layer.down),
    )


def _matrix(linear: Linear) -> DecodeMatrix:
    return DecodeMatrix(linear.matrix if isinstance(linear, PackedLinear) else linear.weight, linear.bias)
