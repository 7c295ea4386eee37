"""The quantiser of ternary training: what every optimizer step does to all ternary matrices, in two calls.

`block_abs_sums` gives what scales are made of, `ternarise` writes the quantised matrices with these scales, counts
zeros and flips, and packs codes to 2 bits in the same pass. `ternarise_reference` says what each computes; all
implementations agree with it bit by bit. Both take lists, so that on a GPU all matrices share a launch.

Shapes: weights [..., o, i], scales [..., R, C]; R must divide the rows of a half, C must divide i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megacpt.ops import ternarise_cpu, ternarise_cuda, ternarise_reference
from megacpt.ops.dispatch import FusedOp, Kernel
from megacpt.ops.tensors import FORMATS
from megacpt.ops.ternarise_reference import Blocks, blocks_of

__all__ = ["TERNARISE", "Blocks", "block_abs_sums", "joined_rows", "ternarise", "unpack"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Functions(Protocol):
    """What an implementation offers; see `ternarise_reference` for the meaning."""

    def block_abs_sums(self, weights: Sequence[Tensor], blocks: Sequence[Blocks]) -> list[Tensor]:
        """Absolute sums."""
        ...

    def ternarise(
        self,
        weights: Sequence[Tensor],
        scales: Sequence[Tensor],
        outs: Sequence[Tensor] | None,
        halves: Sequence[int],
        packed: Sequence[Tensor] | None,
    ) -> Tensor:
        """Quantised matrices and their counts."""
        ...

    def unpack(self, kept: Tensor, scales: Tensor, out: Tensor, halves: int) -> None:
        """A matrix of its codes."""
        ...


def _compiled() -> Functions:
    return ternarise_cpu.load()


TERNARISE: FusedOp[Functions] = FusedOp(
    "ternarise",
    reference=ternarise_reference,
    fallback_cost="several times slower than the compiled kernel on a CPU",
    kernels=(
        Kernel("cpu", frozenset(FORMATS), _compiled),
        Kernel("cuda", frozenset(FORMATS), ternarise_cuda.load),
    ),
)


def block_abs_sums(weights: Sequence[Tensor], blocks: Sequence[Blocks]) -> list[Tensor]:
    """Sum the absolute weights of each block.

    Args:
        weights: [..., o, i], all of one dtype and on one device.
        blocks: of each weight.

    Returns:
        For each weight [..., R, C] float64. A NaN makes its block's sum NaN.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check_alike("weights", weights)
    for n, (weight, at) in enumerate(zip(weights, blocks, strict=True)):
        _check_blocks(n, weight, at)
    return _functions(weights).block_abs_sums(weights, blocks) if weights else []


def joined_rows(rows: Tensor, blocks: Blocks) -> Tensor:
    """Make the sums of blocks of those of their rows, in the order of `block_abs_sums` and with its bits.

    Args:
        rows: [..., o, C] float64: what `block_abs_sums` gives where each row is a block.
        blocks: of the matrix [..., o, i].

    Returns:
        [..., R, C] float64.
    """
    return ternarise_reference.joined_rows(rows, blocks)


@torch.no_grad()
def ternarise(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor] | None,
    halves: Sequence[int] | None = None,
    packed: Sequence[Tensor] | None = None,
) -> Tensor:
    """Write code times scale of each weight to `outs`, and count zero codes and flips.

    Args:
        weights: [..., o, i], all of one dtype and on one device.
        scales: [..., R, C] float32 (float64 for float64), above 0.
        outs: [..., o, i], contiguous, all of the weights' dtype, or of a narrower one for float32 weights. They hold
            the values of the last call: a flip is a code that differs from the sign of what is overwritten. None
            where only `packed` is wanted; then every code that is not 0 is a flip.
        halves: 2 for two matrices above each other that share scales, else 1; None for 1 throughout.
        packed: [..., o, ceil(i / 4)] uint8, contiguous; gets the codes, four a byte (`packed_codes`).

    Returns:
        [n, 2] int64, on the weights' device: zero codes, and flips.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    halves = [1] * len(weights) if halves is None else halves
    _check_alike("weights", weights)
    if outs is None and packed is None:
        raise ValueError("neither outs nor packed are given: nothing would be kept of the codes")
    _check_alike("outs", outs or [])
    for n, (weight, scale, half) in enumerate(zip(weights, scales, halves, strict=True)):
        _check_blocks(n, weight, blocks_of(scale, half))
        _check_scale(n, weight, scale)
        if outs is not None:
            _check_out(n, weight, outs[n])
        if packed is not None:
            _check_packed(n, weight, packed[n])
    if not weights:
        return torch.empty(0, 2, dtype=torch.int64)
    return _functions(weights).ternarise(weights, scales, outs, halves, packed)


@torch.no_grad()
def unpack(kept: Tensor, scales: Tensor, out: Tensor, halves: int = 1) -> None:
    """Write code times scale of each weight to `out`.

    Args:
        kept: codes: [..., o, ceil(i / 4)] uint8, four a byte (`packed_codes`), or [..., o, i] float8 e4m3.
        scales: [..., R, C] float32.
        out: [..., o, i] of a floating dtype, contiguous.
        halves: 2 for two matrices above each other that share scales, else 1.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check_alike("outs", [out])
    _check_blocks(0, out, blocks_of(scales, halves))
    if scales.dtype is not torch.float32 or scales.shape[:-2] != out.shape[:-2] or not out.is_contiguous():
        raise ValueError(f"out must be contiguous, and scales {list(scales.shape)} float32 of as many matrices")
    if kept.dtype is torch.uint8:
        _check_packed(0, out, kept)
    elif kept.dtype is not torch.float8_e4m3fn or kept.shape != out.shape or not kept.is_contiguous():
        raise ValueError(
            f"codes must be contiguous {list(out.shape)} in float8_e4m3fn, or four a byte in uint8, not "
            f"{list(kept.shape)} in {kept.dtype}"
        )
    _functions([out]).unpack(kept, scales, out, halves)


def _functions(weights: Sequence[Tensor]) -> Functions:
    return TERNARISE.choose(weights[0].device.type, weights[0].dtype).functions


def _check_alike(name: str, tensors: Sequence[Tensor]) -> None:
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) > 1 or any(dtype not in _FLOATS for dtype, _ in kinds):
        raise ValueError(f"{name} must be of one floating-point dtype and on one device, not {sorted(map(str, kinds))}")


def _check_blocks(n: int, weight: Tensor, blocks: Blocks) -> None:
    rows, columns, halves = blocks
    if weight.dim() < 2 or halves not in (1, 2):
        raise ValueError(f"weight {n} must be [..., o, i], of 1 or 2 halves, not {list(weight.shape)} of {halves}")
    o, i = weight.shape[-2:]
    if rows < 1 or columns < 1 or o % (halves * rows) or i % columns:
        part = "o" if halves == 1 else "o / 2"
        raise ValueError(
            f"{rows} x {columns} blocks do not divide weight {n}, [{o}, {i}]: R must divide {part}, and C i"
        )


def _check_scale(n: int, weight: Tensor, scale: Tensor) -> None:
    wanted = torch.float64 if weight.dtype is torch.float64 else torch.float32
    if scale.shape[:-2] != weight.shape[:-2] or scale.dtype is not wanted or scale.device != weight.device:
        leading = ", ".join(map(str, [*weight.shape[:-2], "R", "C"]))
        raise ValueError(
            f"scales {n} must be [{leading}] {wanted} on {weight.device}, not {list(scale.shape)} {scale.dtype} "
            f"on {scale.device}"
        )


def _check_out(n: int, weight: Tensor, out: Tensor) -> None:
    wide = weight.dtype in (torch.float32, torch.float64) and out.itemsize <= weight.itemsize
    fits = out.dtype is weight.dtype or wide
    if out.shape != weight.shape or out.device != weight.device or not out.is_contiguous() or not fits:
        raise ValueError(
            f"out {n} must be contiguous {list(weight.shape)} on {weight.device}, of the weights' dtype, or of a "
            f"narrower one for float32; it is {list(out.shape)} {out.dtype} on {out.device}, for {weight.dtype}"
        )


def _check_packed(n: int, weight: Tensor, packed: Tensor) -> None:
    wanted = [*weight.shape[:-1], -(-weight.shape[-1] // 4)]
    fits = packed.dtype is torch.uint8 and packed.is_contiguous() and packed.device == weight.device
    if list(packed.shape) != wanted or not fits:
        raise ValueError(f"packed {n} must be contiguous {wanted} uint8 on {weight.device}, not {list(packed.shape)}")
