"""Grids of levels behind one interface: what is measured of a block, its scale, its codes, and the gradient.

A quantised weight is code * scale (for QuEST in another basis). The scale is made of one or two float64 numbers a
block, so that it does not depend on how the block is spread over ranks.

Shapes: [.., o, i] weights; [k, .., R, C] what is measured; [.., R, C] scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from megacpt.ops.ternarise import block_abs_sums
from megacpt.quant.hadamard import gaussian_clip, transform
from megacpt.quant.scales import Blocks

if TYPE_CHECKING:
    from megacpt.config.quantise import QuantiseConfig

EPSILON = 1e-5  # of TriLM and BitNet b1.58


class Grid(Protocol):
    """Levels that weights are rounded to.

    Attributes:
        joined: how those of the parts of a block become those of the block.
        transform: the length of the vectors that are transformed before they are rounded; 1 for none.
    """

    joined: Literal["mean", "max"]
    transform: int

    def measure(self, weights: Sequence[Tensor], blocks: Sequence[Blocks]) -> list[Tensor]:
        """Sums (for means) or maxima, k for each block of each weight, [k, .., R, C] float64."""

    def scales(self, measured: Tensor) -> Tensor:
        """The scale of each block from its means or maxima [k, .., R, C]: [.., R, C] float64, not yet rounded."""

    def codes(self, weight: Tensor, scales: Tensor, measured: Tensor, blocks: Blocks) -> Tensor:
        """The nearest level of each weight, [.., o, i] int8, under float32 scales."""

    def gradient(self, grad: Tensor, weight: Tensor, scales: Tensor, blocks: Blocks) -> Tensor:
        """What the latent weight gets of the gradient of the quantised one; both [.., o, i]."""


class Ternary:
    """-1, 0 and 1 times the mean absolute weight (TriLM, arXiv 2407.12327, table 1; BitNet b1.58, arXiv 2402.17764).

    Args:
        rule: ``add`` EPSILON to the mean, or ``clamp`` it to EPSILON from below.
    """

    transform = 1
    joined: Literal["mean", "max"] = "mean"

    def __init__(self, rule: Literal["add", "clamp"] = "add") -> None:
        self.rule = rule

    def measure(self, weights: Sequence[Tensor], blocks: Sequence[Blocks]) -> list[Tensor]:
        """See `Grid.measure`."""
        return [sums[None] for sums in block_abs_sums(weights, blocks)]

    def scales(self, measured: Tensor) -> Tensor:
        """See `Grid.scales`."""
        return measured[0] + EPSILON if self.rule == "add" else measured[0].clamp(min=EPSILON)

    def codes(self, weight: Tensor, scales: Tensor, measured: Tensor, blocks: Blocks) -> Tensor:
        """round(clip(weight / scale, -1, 1)), halves going to 0.

        The quotient rounds to a number above one half exactly where the weight is above half of the scale, which is
        exact: comparing needs no division.
        """
        del measured
        view, half = blocks.view(weight), blocks.spread(scales) / 2
        signs = (view > half).view(torch.int8) - (view < -half).view(torch.int8)
        return signs.view(weight.shape)

    def gradient(self, grad: Tensor, weight: Tensor, scales: Tensor, blocks: Blocks) -> Tensor:
        """Straight through, those of clipped weights too."""
        del weight, scales, blocks
        return grad


class Binary:
    """-1 and 1 times the mean absolute weight, by the sign of the distance to the mean weight (BiLM, ibid.)."""

    transform = 1
    joined: Literal["mean", "max"] = "mean"

    def measure(self, weights: Sequence[Tensor], blocks: Sequence[Blocks]) -> list[Tensor]:
        """See `Grid.measure`."""
        pairs = zip(block_abs_sums(weights, blocks), map(Blocks.sums, blocks, weights), strict=True)
        return [torch.stack(pair) for pair in pairs]

    def scales(self, measured: Tensor) -> Tensor:
        """See `Grid.scales`."""
        return measured[0]

    def codes(self, weight: Tensor, scales: Tensor, measured: Tensor, blocks: Blocks) -> Tensor:
        """sign(weight - mean), 1 where they are equal."""
        del scales
        above: Tensor = blocks.view(weight) >= blocks.spread(measured[1].to(torch.float32))
        return (above.view(torch.int8) * 2 - 1).view(weight.shape)

    def gradient(self, grad: Tensor, weight: Tensor, scales: Tensor, blocks: Blocks) -> Tensor:
        """Straight through."""
        del weight, scales, blocks
        return grad


class Integer:
    """Whole numbers up to 2^(bits - 1) - 1 either side of 0, which the largest weight of the block becomes.

    Args:
        bits: 2 to 8.
    """

    transform = 1
    joined: Literal["mean", "max"] = "max"

    def __init__(self, bits: int) -> None:
        self.largest = (1 << (bits - 1)) - 1

    def measure(self, weights: Sequence[Tensor], blocks: Sequence[Blocks]) -> list[Tensor]:
        """See `Grid.measure`."""
        return [at.largest(weight.abs())[None] for weight, at in zip(weights, blocks, strict=True)]

    def scales(self, measured: Tensor) -> Tensor:
        """See `Grid.scales`."""
        return measured[0] / self.largest

    def codes(self, weight: Tensor, scales: Tensor, measured: Tensor, blocks: Blocks) -> Tensor:
        """round(weight / scale), halves going to even; a scale that is 0 leaves 0."""
        del measured
        steps = _in_steps(blocks.view(weight), blocks.spread(scales)).round_()
        return steps.clamp_(-self.largest, self.largest).to(torch.int8).view(weight.shape)

    def gradient(self, grad: Tensor, weight: Tensor, scales: Tensor, blocks: Blocks) -> Tensor:
        """Straight through."""
        del weight, scales, blocks
        return grad


class Quest:
    """Evenly spaced levels of groups that a Hadamard transform made Gaussian (QuEST, arXiv 2502.05003).

    Levels are odd multiples of the scale, half a step; the outermost lie where the mean squared error of a Gaussian of
    the group's root mean square is least. The gradient passes, in the transformed basis, where the weight is not
    farther from its level than half a step (the trust estimator).

    Args:
        bits: 1 to 7.
        group: length of the transform, and of the weights that share a scale.
    """

    joined: Literal["mean", "max"] = "mean"

    def __init__(self, bits: int, group: int) -> None:
        self.largest = (1 << bits) - 1
        self.half_step = gaussian_clip(bits) / self.largest
        self.transform = group

    def measure(self, weights: Sequence[Tensor], blocks: Sequence[Blocks]) -> list[Tensor]:
        """See `Grid.measure`."""
        # The transform is orthogonal: it leaves the mean square of a group as it is.
        return [at.sums(weight.double().square())[None] for weight, at in zip(weights, blocks, strict=True)]

    def scales(self, measured: Tensor) -> Tensor:
        """See `Grid.scales`."""
        return measured[0].sqrt() * self.half_step

    def codes(self, weight: Tensor, scales: Tensor, measured: Tensor, blocks: Blocks) -> Tensor:
        """2 floor(x / (2 scale)) + 1, clipped; x is the transformed weight."""
        del measured
        steps = _in_steps(blocks.view(transform(weight, self.transform)), blocks.spread(2 * scales))
        odd = steps.floor_().mul_(2).add_(1).clamp_(-self.largest, self.largest)
        return odd.to(torch.int8).view(weight.shape)

    def gradient(self, grad: Tensor, weight: Tensor, scales: Tensor, blocks: Blocks) -> Tensor:
        """Of the transformed weights that lie within half a step of their level."""
        trusted = blocks.view(transform(weight, self.transform)).abs() <= blocks.spread((self.largest + 1) * scales)
        kept = transform(grad, self.transform) * trusted.view(grad.shape)
        return transform(kept, self.transform).to(grad.dtype)


def _in_steps(view: Tensor, scales: Tensor) -> Tensor:
    """Weights over their scales, in float32 or better; 0 where the scale is 0."""
    return view / scales.masked_fill(scales == 0, torch.inf)


def make_grid(config: QuantiseConfig) -> Grid:
    """The grid that `model.quantise` names."""
    if config.grid == "ternary":
        return Ternary(config.scale.rule)
    if config.grid == "binary":
        return Binary()
    assert config.bits is not None
    if config.grid == "int":
        return Integer(config.bits)
    assert config.scale.group is not None
    return Quest(config.bits, config.scale.group)
