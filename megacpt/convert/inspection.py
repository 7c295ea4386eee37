"""What a checkpoint holds, and where two of them differ: tensor by tensor and layer by layer, a block at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megacpt.checkpoint.pieces import LAYERS, Piece, PieceReader
from megacpt.convert.derived import Progress
from megacpt.errors import CheckpointError

_NUMBER = re.compile(rf"(?<={re.escape(LAYERS)})(\d+)(?=\.)")
Place = tuple[str, int | None]
"""Name of a tensor, with ``*`` for the number of its layer, and that number; None for a tensor of no layer."""


@dataclass
class Numbers:
    """What the numbers of a tensor are like, summed in float64.

    Attributes:
        count: how many.
        zeros: of these.
        bad: of these that are infinite or not a number; the sums leave them out.
        total: their sum.
        squares: the sum of their squares.
        largest: the largest magnitude.
    """

    count: int = 0
    zeros: int = 0
    bad: int = 0
    total: float = 0.0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, block: Tensor) -> None:
        """Take a block in."""
        wide = block.double()
        finite = torch.isfinite(wide)
        bad = int(wide.numel() - finite.sum())
        wide = torch.where(finite, wide, 0.0) if bad else wide
        self.count += wide.numel()
        self.bad += bad
        self.zeros += int((wide == 0).sum()) - bad
        self.total += float(wide.sum())
        self.squares += float(wide.square().sum())
        self.largest = max(self.largest, float(wide.abs().amax())) if wide.numel() else self.largest

    def join(self, other: Numbers) -> None:
        """Take the sums of another one in."""
        for key in ("count", "zeros", "bad", "total", "squares"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        self.largest = max(self.largest, other.largest)

    @property
    def mean(self) -> float:
        """Of the finite ones."""
        return self.total / max(self.count - self.bad, 1)

    @property
    def deviation(self) -> float:
        """Standard deviation of the finite ones."""
        return math.sqrt(max(self.squares / max(self.count - self.bad, 1) - self.mean**2, 0.0))


@dataclass
class Held:
    """A tensor of a checkpoint.

    Attributes:
        name: as it is stored.
        shape: of the whole tensor.
        dtype: such as ``float32``.
        blocks: in how many it is stored.
        numbers: by layer, where they were read; None as the layer of a tensor of no layer.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    blocks: int
    numbers: dict[int | None, Numbers] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of the whole tensor."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * dtype.itemsize


@dataclass
class Distance:
    """How far the numbers of two tensors are apart, summed in float64.

    Attributes:
        count: how many numbers.
        equal: of these.
        apart: the sum of the squared differences.
        first: the sum of the squares in the first one.
        second: in the second one.
        product: the sum of the products.
        largest: the largest difference.
    """

    count: int = 0
    equal: int = 0
    apart: float = 0.0
    first: float = 0.0
    second: float = 0.0
    product: float = 0.0
    largest: float = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take two blocks of one shape in."""
        one, other = a.double(), b.double()
        apart = one - other
        self.count += a.numel()
        self.equal += int((one == other).sum())
        self.apart += float(apart.square().sum())
        self.first += float(one.square().sum())
        self.second += float(other.square().sum())
        self.product += float((one * other).sum())
        self.largest = max(self.largest, float(apart.abs().amax())) if a.numel() else self.largest

    def join(self, other: Distance) -> None:
        """Take the sums of another one in."""
        for key in ("count", "equal", "apart", "first", "second", "product"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        self.largest = max(self.largest, other.largest)

    @property
    def relative(self) -> float:
        """The norm of the difference over that of the first."""
        return math.sqrt(self.apart / self.first) if self.first else math.inf if self.apart else 0.0

    @property
    def cosine(self) -> float:
        """Of the angle between both."""
        norms = math.sqrt(self.first * self.second)
        return self.product / norms if norms else 1.0 if self.first == self.second else 0.0


@dataclass
class Difference:
    """Where two checkpoints differ.

    Attributes:
        distances: of the tensors that both have in one shape, by place.
        shapes: of tensors that they have in two shapes, by name.
        only_first: names that the second lacks.
        only_second: names that the first lacks.
    """

    distances: dict[Place, Distance]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    only_first: list[str]
    only_second: list[str]

    def by_name(self) -> dict[str, Distance]:
        """Join the layers of each tensor."""
        found: dict[str, Distance] = {}
        for (name, _), distance in self.distances.items():
            found.setdefault(name, Distance()).join(distance)
        return found

    def by_layer(self) -> dict[int | None, Distance]:
        """Join the tensors of each layer, by its number; None: those of no layer."""
        found: dict[int | None, Distance] = {}
        for (_, layer), distance in sorted(self.distances.items(), key=lambda item: (item[0][1] is None, item[0][1])):
            found.setdefault(layer, Distance()).join(distance)
        return found


def inspect(
    folder: Path, optimizer: bool = False, numbers: bool = False, progress: Progress | None = None
) -> list[Held]:
    """List the tensors of a checkpoint in the order of their names.

    Args:
        folder: a checkpoint of megacpt, or another folder of Megatron's format ``torch_dist``.
        optimizer: also the state of the optimizer.
        numbers: read them, a block at a time, and say what they are like.
        progress: told after each block that was read.

    Raises:
        CheckpointError: the folder holds no checkpoint, or it is damaged.
    """
    reader = PieceReader(folder)
    pieces = reader.pieces(weights_only=not optimizer)
    found = {
        name: Held(name, shape, str(reader.tensors[name].properties.dtype).removeprefix("torch."), 0)
        for name, shape in reader.shapes(weights_only=not optimizer).items()
    }
    for done, piece in enumerate(pieces, 1):
        held = found[piece.name]
        held.blocks += 1
        if numbers:
            for (_, layer), block in parts(piece, reader.read(piece)):
                held.numbers.setdefault(layer, Numbers()).add(block)
            if progress is not None:
                progress(done, len(pieces))
    return list(found.values())


def compare(first: Path, second: Path, progress: Progress | None = None) -> Difference:
    """Measure how far the weights of two checkpoints are apart, whatever layouts wrote them.

    Args:
        first: a checkpoint; distances are relative to it.
        second: another one.
        progress: told after each block.

    Raises:
        CheckpointError: as `inspect`; or they have no tensor in common.
    """
    one, other = PieceReader(first), PieceReader(second)
    ours, theirs = one.shapes(), other.shapes()
    both = {name for name in ours.keys() & theirs.keys() if ours[name] == theirs[name]}
    if not ours.keys() & theirs.keys():
        raise CheckpointError(f"{first} and {second} have no tensor in common")
    pieces = [piece for piece in one.pieces() if piece.name in both]
    distances: dict[Place, Distance] = {}
    for done, piece in enumerate(pieces, 1):
        for (place, a), (_, b) in zip(parts(piece, one.read(piece)), parts(piece, other.read(piece)), strict=True):
            distances.setdefault(place, Distance()).add(a, b)
        if progress is not None:
            progress(done, len(pieces))
    return Difference(
        distances,
        {name: (ours[name], theirs[name]) for name in sorted(ours.keys() & theirs.keys() - both)},
        sorted(ours.keys() - theirs.keys()),
        sorted(theirs.keys() - ours.keys()),
    )


def parts(piece: Piece, block: Tensor) -> Iterator[tuple[Place, Tensor]]:
    """Cut a block into what it holds of each layer.

    Args:
        piece: which block it is.
        block: its numbers, [*piece.sizes].
    """
    numbered = _NUMBER.search(piece.name)
    if numbered is not None:
        yield (_NUMBER.sub("*", piece.name), int(numbered[1])), block
    elif LAYERS in piece.name:
        name = piece.name.replace(LAYERS, LAYERS + "*.")
        for row, numbers in enumerate(block, piece.offsets[0]):
            yield (name, row), numbers
    else:
        yield (piece.name, None), block


def damaged(tensors: Iterable[Held]) -> list[str]:
    """Name the tensors, with their layers, that hold numbers which are infinite or not a number."""
    return [
        f"{held.name}{'' if layer is None else f' (layer {layer})'}: {numbers.bad:,}"
        for held in tensors
        for layer, numbers in held.numbers.items()
        if numbers.bad
    ]
