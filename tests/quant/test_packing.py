"""Packed codes come back as they were, whatever their number."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megacpt.quant.packing import (
    changed_trits4,
    pack_bits,
    pack_trits4,
    pack_trits5,
    unpack_bits,
    unpack_trits4,
    unpack_trits5,
)

Pack, Unpack = Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]
TRITS = pytest.mark.parametrize(
    ("pack", "unpack", "size"), [(pack_trits4, unpack_trits4, 4), (pack_trits5, unpack_trits5, 5)], ids=["4", "5"]
)
BITS = [1, 2, 3, 4, 5, 6, 7, 8]


def all_groups(size: int) -> Tensor:
    return torch.tensor(list(itertools.product((-1, 0, 1), repeat=size)), dtype=torch.int8)


@TRITS
def test_every_group_of_a_byte_comes_back(pack: Pack, unpack: Unpack, size: int) -> None:
    groups = all_groups(size)
    packed = pack(groups)
    assert packed.shape == (3**size, 1)
    assert packed.dtype == torch.uint8
    assert len(packed.unique()) == 3**size
    assert torch.equal(unpack(packed, size), groups)


def test_the_bytes_are_those_of_the_formulas() -> None:
    for group, byte in zip(all_groups(4).tolist(), pack_trits4(all_groups(4)).flatten().tolist(), strict=True):
        assert byte == sum((code + 1) * 4**j for j, code in enumerate(group))
    for group, byte in zip(all_groups(5).tolist(), pack_trits5(all_groups(5)).flatten().tolist(), strict=True):
        value = sum((code + 1) * 3 ** (4 - j) for j, code in enumerate(group))
        assert byte == -(-256 * value // 243)


@TRITS
@given(shape=st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 40)), seed=st.integers(0, 2**32))
def test_rows_of_any_length_come_back(pack: Pack, unpack: Unpack, size: int, shape: tuple[int, ...], seed: int) -> None:
    codes = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack(codes)
    assert packed.shape == (*shape[:-1], -(-shape[-1] // size))
    assert torch.equal(unpack(packed, shape[-1]), codes)


@given(shape=st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 40)), seed=st.integers(0, 2**32))
def test_codes_that_differ_are_counted(shape: tuple[int, ...], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(-1, 2, shape, generator=draw, dtype=torch.int8) for _ in range(2))
    assert changed_trits4(pack_trits4(first), pack_trits4(second)) == (first != second).sum()
    assert changed_trits4(pack_trits4(first), pack_trits4(first)) == 0


def test_what_fills_the_last_byte_counts_as_zero() -> None:
    codes = torch.ones(3, 6, dtype=torch.int8)
    assert torch.equal(unpack_trits4(pack_trits4(codes), 8)[:, 6:], torch.zeros(3, 2, dtype=torch.int8))
    assert torch.equal(unpack_trits5(pack_trits5(codes), 10)[:, 6:], torch.zeros(3, 4, dtype=torch.int8))


@pytest.mark.parametrize("bits", BITS)
@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 40)), seed=st.integers(0, 2**32))
def test_codes_of_bits_come_back(bits: int, shape: tuple[int, int], seed: int) -> None:
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (shape[0], -(-shape[1] * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, shape[1]), codes)


@pytest.mark.parametrize("bits", BITS)
def test_bits_lie_in_order_from_the_lowest(bits: int) -> None:
    codes = [(7 * j + 3) % 2**bits for j in range(13)]
    whole = sum(code << (bits * j) for j, code in enumerate(codes))
    found = pack_bits(torch.tensor([codes], dtype=torch.uint8), bits)
    assert bytes(found[0].tolist()) == whole.to_bytes(-(-13 * bits // 8), "little")
