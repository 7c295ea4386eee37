"""The product with a packed ternary matrix beside torch's with dense ones, on matrices that no cache holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from megacpt.bench.result import Series
from megacpt.bench.turns import time_in_turns
from megacpt.ops.packed_linear import Activations, pack_matrix, packed_linear

SHAPES = ((2048, 2048), (4096, 11008), (11008, 4096))
TOKENS = (1, 4, 16, 64)
INT8, FLOAT, FLOAT32, BFLOAT16 = "packed, int8", "packed, float", "torch float32", "torch bfloat16"
SIDES = (INT8, FLOAT, FLOAT32, BFLOAT16)


def case_name(o: int, i: int, tokens: int) -> str:
    """What a case is called, before the name of a side."""
    return f"layer {o} x {i}, {tokens} token{'s' * (tokens > 1)}"


def time_layers(
    shapes: tuple[tuple[int, int], ...], tokens: tuple[int, ...], cold: int, blocks: int, heard: Callable[[], None]
) -> dict[str, Series]:
    """Time all sides on all cases, in turns.

    Args:
        shapes: o rows and i columns of the matrices.
        tokens: rows of the activations.
        cold: bytes of weights that a side goes through in turn, as a decoder does.
        blocks: blocks of calls for each side.
        heard: is called after each turn of all sides.
    """
    found = {}
    for o, i in shapes:
        products = {name: _products(name, o, i, cold) for name in SIDES}
        for count in tokens:
            x = torch.randn(count, i, generator=torch.Generator().manual_seed(count))
            sides = {name: _turn(matrices, x) for name, matrices in products.items()}
            with torch.inference_mode():
                times = time_in_turns(sides, blocks, heard)
            for name, seconds in times.items():
                found[f"{case_name(o, i, count)}: {name}"] = Series(blocks=seconds, work=float(count), unit="token")
    return found


def _turn(products: list[Callable[[Tensor], Tensor]], x: Tensor) -> Callable[[], Tensor]:
    """A function that multiplies `x` with one matrix after the other."""
    endless = cycle(products)
    return lambda: next(endless)(x)


def _products(side: str, o: int, i: int, cold: int) -> list[Callable[[Tensor], Tensor]]:
    """Products with as many random matrices as it takes for each to come from memory."""
    each = o * i * {INT8: 0.25, FLOAT: 0.25, FLOAT32: 4.0, BFLOAT16: 2.0}[side]
    return [product for _ in range(max(1, round(cold / each))) for product in _product(side, o, i)]


def _product(side: str, o: int, i: int) -> Iterator[Callable[[Tensor], Tensor]]:
    codes = torch.randint(-1, 2, (o, i), dtype=torch.int8)
    if side in (INT8, FLOAT):
        matrix = pack_matrix(codes, torch.full((1, 1), 0.02))
        activations: Activations = "int8" if side == INT8 else "float"
        yield lambda x: packed_linear(x, matrix, activations)
    elif side == FLOAT32:
        weight = codes.float() * 0.02
        yield lambda x: F.linear(x, weight)
    else:
        half = codes.to(torch.bfloat16) * 0.02
        yield lambda x: F.linear(x.to(torch.bfloat16), half)
