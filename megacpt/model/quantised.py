"""Tensor-parallel linear layers and experts that multiply with a quantised form of their weights.

The weight is latent: it is trained in full precision, and rounded to the levels of `model.quantise` once after each
update. The gradient of the quantised matrix goes straight through to it (arXiv 2407.12327, table 1). A block that
shares a scale is one of the whole matrix, whatever part of it is on this rank.

Shapes: o x i = this rank's part of a matrix, e = experts on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megacpt.model.experts import ExpertWeights, grouped_linear
from megacpt.model.linear import ColumnLinear, Output, RowLinear, local_linear
from megacpt.model.sharded_norm import SubNorm
from megacpt.ops.ternarise import ternarise
from megacpt.quant.activations import round_tokens
from megacpt.quant.cache import Cache
from megacpt.quant.grids import Grid, Ternary, make_grid
from megacpt.quant.matrix import joined
from megacpt.quant.scales import Blocks, rounded

if TYPE_CHECKING:
    from megacpt.config.model import ModelConfig
    from megacpt.config.quantise import CacheForm, MatrixPart, QuantiseConfig


class Quantiser:
    """Keeps the quantised form of a latent weight.

    Args:
        weight: [.., o, i].
        config: `model.quantise`.
        form: how the quantised matrix is kept, `quantised_cache`.
        split_dim: the dimension of the whole matrix that is split over ranks.
        halves: 2 for a gated first matrix, [gate; up].
        group: the ranks that hold the other parts; None where this one has the whole matrix.

    Attributes:
        rebuilt: how often the weight was quantised.
        zeros: [] int64, codes that are 0.
        flips: [] int64, codes that the last update changed.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        config: QuantiseConfig,
        form: CacheForm,
        split_dim: Literal[0, 1],
        halves: int = 1,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        ranks = 1 if group is None else group.size()
        self.weight, self.config = weight, config
        self.grid: Grid = make_grid(config)
        self.blocks = Blocks.of((weight.shape[-2], weight.shape[-1]), config.scale, split_dim, halves, ranks)
        self.cache = Cache(form, weight.dtype, self.blocks, self.grid.transform)
        # Blocks that reach over several ranks: how many there are, and which of them is here.
        parts = config.scale.shards or 1
        self.group = group if config.scale.group is None and parts < ranks else None
        self.slots = parts
        self.slot = 0 if self.group is None else self.group.rank() * parts // ranks
        self.rebuilt = 0
        self.zeros = self.flips = torch.zeros((), dtype=torch.int64)
        self.scales = torch.empty(0)
        self._version: int | None = None

    @property
    def stale(self) -> bool:
        """Whether the weight has changed since it was quantised."""
        return self._version != self.weight._version

    def forget(self) -> None:
        """The weight was changed in a way that its version does not tell."""
        self._version = None

    def keep(self, codes: Tensor) -> None:
        """Take the codes [.., o, i] int8 of the weight under its scales."""
        self.done(codes.numel() - torch.count_nonzero(codes), self.cache.put(codes, self.scales))

    def done(self, zeros: Tensor, flips: Tensor) -> None:
        """The weight as it is now has been quantised."""
        self.zeros, self.flips = zeros, flips
        self.rebuilt += 1
        self._version = self.weight._version

    @contextmanager
    def matrix(self) -> Iterator[Tensor]:
        """The quantised matrix [.., o, i], to be multiplied with inside; its gradient goes to the latent weight.

        Unless the matrix is kept anyway, what autograd keeps of it for the backward pass is a note to make it again.
        """
        if self.stale:
            refresh([self])
        made: Tensor = _StraightThrough.apply(self.weight, self.cache.matrix(), self)
        if self.cache.lasting or not torch.is_grad_enabled():
            yield made
            return
        memory = made.untyped_storage().data_ptr()

        def pack(saved: Tensor) -> Tensor | _Note:
            if saved.untyped_storage().data_ptr() != memory:
                return saved
            return _Note(saved.size(), saved.stride(), int(saved.storage_offset()))

        def unpack(kept: Tensor | _Note) -> Tensor:
            return self.cache.matrix().as_strided(*kept) if isinstance(kept, _Note) else kept

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield made


class _Note(NamedTuple):
    """Which view of a quantised matrix autograd wanted to keep."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _StraightThrough(torch.autograd.Function):
    """The quantised matrix in the place of the latent weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, matrix: Tensor, quantiser: Quantiser) -> Tensor:
        """[.., o, i] to [.., o, i]."""
        ctx.quantiser = quantiser
        if quantiser.grid.transform > 1:
            ctx.save_for_backward(weight)
        return matrix.view_as(matrix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """[.., o, i] to [.., o, i]."""
        quantiser: Quantiser = ctx.quantiser
        if ctx.saved_tensors:
            grad = quantiser.grid.gradient(grad, ctx.saved_tensors[0], quantiser.scales, quantiser.blocks)
        return grad, None, None


@torch.no_grad()
def refresh(quantisers: Sequence[Quantiser]) -> None:
    """Quantise latent weights of one model; ranks that share matrices call this with the same ones, in order."""
    grid = quantisers[0].grid
    weights = [each.weight.detach() for each in quantisers]
    measured = rescale(quantisers, grid.measure(weights, [each.blocks for each in quantisers]))
    if isinstance(grid, Ternary):
        _ternarise(quantisers, weights)
        return
    for each, weight, found in zip(quantisers, weights, measured, strict=True):
        each.keep(grid.codes(weight, each.scales, found, each.blocks))


def rescale(quantisers: Sequence[Quantiser], measured: Sequence[Tensor]) -> list[Tensor]:
    """Set scales; ranks that share matrices call this with the same ones, in order.

    Args:
        quantisers: of one model.
        measured: what its grid measured of each weight on this rank, [k, .., R, C] float64.

    Returns:
        Means or maxima of the blocks, [k, .., R, C] for each.
    """
    whole = list(measured)
    sizes = [each.blocks.size(each.weight) for each in quantisers]
    spread = [n for n, each in enumerate(quantisers) if each.group is not None]
    if spread:
        for n, found in zip(spread, _exchanged([(quantisers[n], whole[n]) for n in spread]), strict=True):
            group = quantisers[n].group
            assert group is not None
            whole[n], sizes[n] = found, sizes[n] * group.size() // quantisers[n].slots
    whole = [joined(each.grid, found, size) for each, found, size in zip(quantisers, whole, sizes, strict=True)]
    for each, found in zip(quantisers, whole, strict=True):
        each.scales = rounded(each.grid.scales(found), each.config.scale.format)
    return whole


def _ternarise(quantisers: Sequence[Quantiser], weights: Sequence[Tensor]) -> None:
    """Quantise all ternary matrices in one go: dense ones over those of the step before, others as packed codes."""
    scales = [
        each.scales.to(torch.promote_types(weight.dtype, torch.float32))
        for each, weight in zip(quantisers, weights, strict=True)
    ]
    halves = [each.blocks.halves for each in quantisers]
    if quantisers[0].cache.lasting:
        known = [each.cache.filled for each in quantisers]
        outs = [each.cache.memory(weight) for each, weight in zip(quantisers, weights, strict=True)]
        for each, before, (zeros, flips) in zip(
            quantisers, known, ternarise(weights, scales, outs, halves).unbind(), strict=True
        ):
            each.done(zeros, flips * before)
        return
    packed = [packed_memory(weight) for weight in weights]
    counts = ternarise(weights, scales, None, halves, packed)
    for each, codes, (zeros, _) in zip(quantisers, packed, counts.unbind(), strict=True):
        each.done(zeros, each.cache.put_packed(codes, each.scales, each.weight.shape[-1]))


def packed_memory(weight: Tensor) -> Tensor:
    """Memory of the packed codes of a weight [.., o, i]: [.., o, ceil(i / 4)] uint8."""
    return torch.empty(*weight.shape[:-1], -(-weight.shape[-1] // 4), dtype=torch.uint8, device=weight.device)


def _exchanged(parts: Sequence[tuple[Quantiser, Tensor]]) -> list[Tensor]:
    """What is measured of blocks, from what each rank measured of its part of them; in one exchange."""
    table = torch.stack([torch.stack([found] * each.slots) for each, found in parts])
    for row, (each, _) in zip(table, parts, strict=True):
        row[: each.slot] = 0
        row[each.slot + 1 :] = 0
    first = parts[0][0]
    dist.all_reduce(table, dist.ReduceOp.SUM if first.grid.joined == "mean" else dist.ReduceOp.MAX, first.group)
    return [row[each.slot] for row, (each, _) in zip(table, parts, strict=True)]


class QuantisedColumnLinear(ColumnLinear):
    """`ColumnLinear` with a quantised weight: linear_qkv, linear_fc1.

    Args:
        quantise: `model.quantise`.
        cache: how the quantised weight is kept.
        halves: 2 for a gated linear_fc1.
        args: of Megatron's layer.
        options: of Megatron's layer.
    """

    def __init__(self, *args: Any, quantise: QuantiseConfig, cache: CacheForm, halves: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)
        self.activations = quantise.activations
        self.quantiser = Quantiser(self.weight, quantise, cache, 0, halves, self.tp_group)

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> Output:
        """Project [s, b, h]; return the output, and the bias where the caller is to add it."""
        del weight
        rounded_input = round_tokens(input_, self.activations)
        with self.quantiser.matrix() as matrix:
            return super().forward(rounded_input, matrix, runtime_gather_output)


class QuantisedRowLinear(RowLinear):
    """`RowLinear` with a quantised weight: linear_proj, linear_fc2.

    Args:
        quantise: `model.quantise`.
        cache: how the quantised weight is kept.
        args: of Megatron's layer.
        options: of Megatron's layer.
    """

    def __init__(self, *args: Any, quantise: QuantiseConfig, cache: CacheForm, **options: Any) -> None:
        super().__init__(*args, **options)
        self.activations = quantise.activations
        self.quantiser = Quantiser(self.weight, quantise, cache, 1, 1, self.tp_group)

    def forward(self, input_: Tensor) -> Output:
        """Project [s, b, h / tp]; return the output, and the bias where the caller is to add it."""
        rounded_input = round_tokens(input_, self.activations, self.tp_group)
        if self.tp_group.size() > 1:
            return super().forward(rounded_input)  # comes back to `_forward_impl`
        with self.quantiser.matrix() as matrix:
            return local_linear(self, rounded_input, matrix)

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Any:
        del weight
        with self.quantiser.matrix() as matrix:
            return super()._forward_impl(input, matrix, **options)


class NormedRowLinear(SubNorm, RowLinear):
    """`RowLinear` of what `sub_norm` normalises."""


class NormedQuantisedRowLinear(SubNorm, QuantisedRowLinear):
    """`QuantisedRowLinear` of what `sub_norm` normalises."""


class QuantisedExpertWeights(ExpertWeights):
    """One quantised matrix of every expert on this rank, each expert with scales of its own.

    Args:
        quantise: `model.quantise`.
        cache: how the quantised weights are kept.
        split_dim: the dimension that shards cut.
        halves: 2 for a gated first matrix.
        args: of `ExpertWeights`.
    """

    def __init__(
        self, *args: Any, quantise: QuantiseConfig, cache: CacheForm, split_dim: Literal[0, 1], halves: int = 1
    ) -> None:
        super().__init__(*args)
        self.activations = quantise.activations
        self.quantiser = Quantiser(self.weight, quantise, cache, split_dim, halves)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Multiply each row of [N, i], sorted by expert, with the matrix of its expert; [N, o]."""
        rounded_rows = round_tokens(x, self.activations)
        with self.quantiser.matrix() as matrix:
            return grouped_linear(rounded_rows, matrix, counts)


def linear_layers(model: ModelConfig, part: MatrixPart, cache: CacheForm) -> tuple[Any, Any]:
    """What Megatron builds the first and the second matrix of a part of the model from.

    Args:
        model: the network.
        part: ``attention`` or ``mlp``.
        cache: how quantised weights are kept.
    """
    if model.quantise is None or part not in model.quantise.parts:
        return ColumnLinear, NormedRowLinear if model.sub_norm else RowLinear
    options = {"quantise": model.quantise, "cache": cache}
    halves = 2 if part == "mlp" and model.gated else 1
    return (
        ModuleSpec(module=QuantisedColumnLinear, params={**options, "halves": halves}),
        ModuleSpec(module=NormedQuantisedRowLinear if model.sub_norm else QuantisedRowLinear, params=options),
    )


def expert_matrices(model: ModelConfig, cache: CacheForm) -> dict[str, Callable[..., ExpertWeights]]:
    """What makes the matrices of routed experts: arguments of `Experts`."""
    if model.quantise is None or "experts" not in model.quantise.parts:
        return {}
    quantised = partial(QuantisedExpertWeights, quantise=model.quantise, cache=cache)
    return {
        "first": partial(quantised, split_dim=0, halves=2 if model.gated else 1),
        "second": partial(quantised, split_dim=1),
    }
