"""What the distributed optimizer's ranks tell each other after a step, with ternary matrices as codes of 2 bits.

Megatron's ranks each update an equal part of the parameters, cut anywhere, and gather all of them in full. Here, of a
ternary matrix, a rank sends the codes of the rows that it has whole, and before them absolute sums of these rows, so
that all ranks make the same scales. Rows that a cut goes through, and parameters that are not ternary, come in full.
Row sums are those of `block_abs_sums` and are joined in its order: scales and codes are, to the last bit, those of the
whole matrix.

Latent weights are then up to date in the optimizer's parts alone. Checkpoints are made of these (`OptimizerState`); the
model multiplies with the quantised matrices and looks at nothing else.

Shapes: o x i = this rank's part of a matrix, n = its rows, those of all experts; C = blocks beside each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megacpt.model.quantised import Quantiser, packed_memory, rescale
from megacpt.ops.ternarise import Blocks, block_abs_sums, joined_rows, ternarise
from megacpt.quant.packing import changed_trits4

_ZEROS = 0b01010101  # four codes of 0


class GradientsOnly(DistributedDataParallel):
    """Megatron's wrapper of a model chunk without its all-gather of parameters, in whose place `CodeGather` runs."""

    def start_param_sync(self, *unused: Any, **options: Any) -> None:
        """Leave the parameters alone. Each of Megatron's optimizers asks for all of them, also before others' step."""


class CodeGather:
    """Brings all ranks of the data axis what the step of a distributed optimizer changed.

    Args:
        chunks: this rank's model chunks, wrapped.
        quantisers: of all ternary matrices of this rank; frozen ones are left out, as the optimizer leaves them.
    """

    def __init__(self, chunks: Sequence[GradientsOnly], quantisers: Sequence[Quantiser]) -> None:
        found = {id(quantiser.weight): quantiser for quantiser in quantisers}
        self.buckets = [
            _Bucket(buffer, bucket, found)
            for chunk in chunks
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
            for bucket in buffer.buckets
        ]
        moved = {id(quantiser) for bucket in self.buckets for quantiser in bucket.quantisers}
        # In the order of the model, which ranks that share a matrix have in common.
        self.quantisers = [quantiser for quantiser in quantisers if id(quantiser) in moved]

    @torch.no_grad()
    def run(self) -> None:
        """Gather, and quantise; all ranks call this after each step of the optimizer."""
        sums = {id(each): _row_sums(each) for each in self.quantisers}
        packed = {id(each): packed_memory(each.weight) for each in self.quantisers}
        own = [rows for bucket in self.buckets for rows in bucket.own.rows]
        cut = [rows for bucket in self.buckets for rows in bucket.cut]
        _measure(own, sums)
        for bucket in self.buckets:
            bucket.gather(sums, rest=True)
        _measure(cut, sums)
        rescale(self.quantisers, [joined_rows(sums[id(each)], each.blocks)[None] for each in self.quantisers])
        _code([*own, *cut], packed)
        for bucket in self.buckets:
            bucket.gather(packed, rest=False)
        for each in self.quantisers:
            codes = packed[id(each)]
            zeros = each.weight.numel() - changed_trits4(codes, torch.full_like(codes, _ZEROS))
            each.done(zeros, each.cache.put_packed(codes, each.scales, each.weight.shape[-1]))


class _Rows(NamedTuple):
    """Some rows of a matrix."""

    quantiser: Quantiser
    first: int
    last: int

    def of(self, table: Tensor) -> Tensor:
        """These rows of something [.., o, *] that has one for each of the matrix."""
        return table.view(-1, table.shape[-1])[self.first : self.last]

    def scales(self) -> Tensor:
        """The scales of each of the rows, [rows, C]."""
        scales, (parts, columns, halves) = self.quantiser.scales, self.quantiser.blocks
        o = self.quantiser.weight.shape[-2]
        row = torch.arange(self.first, self.last, device=scales.device)
        block = row // o * parts + row % (o // halves) // (o // halves // parts)
        return scales.view(-1, columns)[block]


class _Share(NamedTuple):
    """What a rank has of a bucket: whole rows of ternary matrices; of everything else, where it begins and ends."""

    rows: list[_Rows]
    rest: list[tuple[int, int]]


class _Bucket:
    """A stretch of memory in which parameters lie, and of which every rank updates an equal part.

    Args:
        buffer: Megatron's buffer, with the group of these ranks.
        bucket: one of its buckets.
        quantisers: by identity of their weights.

    Attributes:
        quantisers: of weights in the bucket.
        own: what this rank has.
        cut: rows that no rank has whole.
    """

    def __init__(self, buffer: Any, bucket: Any, quantisers: Mapping[int, Quantiser]) -> None:
        self.group: dist.ProcessGroup = buffer.data_parallel_group
        self.data: Tensor = bucket.param_data
        places = {
            buffer.param_index_map[parameter][0] - bucket.offset: quantisers[id(parameter)]
            for parameter in bucket.params_list
            if id(parameter) in quantisers
        }
        ranks = self.group.size()
        each = self.data.numel() // ranks
        self.shares = [_share(places, rank * each, (rank + 1) * each) for rank in range(ranks)]
        self.own = self.shares[self.group.rank()]
        self.quantisers = list(places.values())
        self.cut = [rows for quantiser in self.quantisers for rows in _cut(quantiser, self.shares)]

    def gather(self, tables: Mapping[int, Tensor], rest: bool) -> None:
        """Bring the whole rows of tables, by identity of the quantiser, to all ranks; the rest of the bucket too."""
        pieces = []
        for share in self.shares:
            pieces.append([rows.of(tables[id(rows.quantiser)]) for rows in share.rows])
            if rest:
                pieces[-1] += [self.data[first:last] for first, last in share.rest]
        _exchange(pieces, self.group)


def _share(places: Mapping[int, Quantiser], start: int, end: int) -> _Share:
    """What lies between two places of a bucket; `places` are those where weights begin."""
    share = _Share([], [])
    done = start
    for begin, quantiser in sorted(places.items()):
        width = quantiser.weight.shape[-1]
        first = -(-max(start - begin, 0) // width)
        last = min(end - begin, quantiser.weight.numel()) // width
        if first < last:
            share.rows.append(_Rows(quantiser, first, last))
            share.rest.append((done, begin + first * width))
            done = begin + last * width
    share.rest.append((done, end))
    return _Share(share.rows, [(first, last) for first, last in share.rest if first < last])


def _cut(quantiser: Quantiser, shares: Sequence[_Share]) -> Iterator[_Rows]:
    """The rows of a weight that are in no share, which are in the order of the ranks."""
    done = 0
    for rows in (rows for share in shares for rows in share.rows if rows.quantiser is quantiser):
        if done < rows.first:
            yield _Rows(quantiser, done, rows.first)
        done = rows.last
    n = quantiser.weight.shape[:-1].numel()
    if done < n:
        yield _Rows(quantiser, done, n)


def _exchange(pieces: Sequence[Sequence[Tensor]], group: dist.ProcessGroup) -> None:
    """Send this rank's pieces to the others, and write theirs: `pieces[r]` is contiguous memory that rank r knows."""
    own = group.rank()
    messages, works = [], []
    for rank, parts in enumerate(pieces):
        if rank == own and parts:
            message = torch.cat([_bytes(part) for part in parts])
        else:
            message = torch.empty(sum(map(_size, parts)), dtype=torch.uint8, device=parts[0].device if parts else None)
        messages.append(message)
        if len(message) and len(pieces) > 1:
            works.append(dist.broadcast(message, dist.get_global_rank(group, rank), group, async_op=True))
    for work in works:
        work.wait()
    for rank, parts in enumerate(pieces):
        if rank != own:
            for part, received in zip(parts, messages[rank].split([_size(part) for part in parts]), strict=True):
                _bytes(part).copy_(received)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _row_sums(quantiser: Quantiser) -> Tensor:
    """Room for the sums of the rows of a weight in each block beside others, [.., o, C] float64."""
    weight = quantiser.weight
    shape = (*weight.shape[:-1], quantiser.blocks.columns)
    return torch.empty(shape, dtype=torch.float64, device=weight.device)


def _measure(pieces: Sequence[_Rows], sums: Mapping[int, Tensor]) -> None:
    """Write the absolute sums of rows."""
    weights = [rows.of(rows.quantiser.weight.detach()) for rows in pieces]
    blocks = [Blocks(rows.last - rows.first, rows.quantiser.blocks.columns) for rows in pieces]
    for rows, found in zip(pieces, block_abs_sums(weights, blocks), strict=True):
        rows.of(sums[id(rows.quantiser)]).copy_(found)


def _code(pieces: Sequence[_Rows], packed: Mapping[int, Tensor]) -> None:
    """Write the codes of rows."""
    ternarise(
        [rows.of(rows.quantiser.weight.detach()) for rows in pieces],
        [rows.scales() for rows in pieces],
        None,
        packed=[rows.of(packed[id(rows.quantiser)]) for rows in pieces],
    )
