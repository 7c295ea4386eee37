"""Codes of few bits in bytes, and back, without loss.

Codes of the last dim go into bytes in order; the last byte is filled up with zeros. Spectra 1.1 (Vaidhya et al. 2025,
arXiv 2506.23025, section 4) describes both ternary forms:

- four trits a byte (2 bits each): b = sum_j (code_j + 1) 4^j;
- five trits a byte (1.6 bits each): v = sum_j (code_j + 1) 3^(4-j) and b = ceil(256 v / 243). That is v as a fraction
  of 243, so that multiplying b by 3 brings one trit after the other above the byte, and nothing is divided.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megacpt.ops.ternarise_reference import kept_codes, packed_codes

_GROUP = 8  # codes of any number of bits fill whole bytes in groups of so many


def pack_trits4(codes: Tensor) -> Tensor:
    """Pack ternary codes, four to a byte.

    Args:
        codes: [.., n] int8 in {-1, 0, 1}.

    Returns:
        [.., ceil(n / 4)] uint8.
    """
    return packed_codes(codes)


def unpack_trits4(packed: Tensor, n: int) -> Tensor:
    """Return the n codes of each row that `pack_trits4` packed, [.., n] int8."""
    return kept_codes(packed, n)


def changed_trits4(packed: Tensor, other: Tensor) -> Tensor:
    """Count the codes that differ between two of what `pack_trits4` gave, [] int64."""
    bits = packed ^ other
    ones = (bits | bits >> 1) & 0b01010101  # one for each code that differs; then sums of two, and of four
    twos = (ones & 0b00110011) + (ones >> 2 & 0b00110011)
    return ((twos + (twos >> 4)) & 0b1111).sum()


def pack_trits5(codes: Tensor) -> Tensor:
    """Pack ternary codes, five to a byte.

    Args:
        codes: [.., n] int8 in {-1, 0, 1}.

    Returns:
        [.., ceil(n / 5)] uint8.
    """
    digits = _digits(codes, 5)
    value = digits[..., 0].clone()
    for place in range(1, 5):
        value = value * 3 + digits[..., place]  # at most 242
    return ((value.to(torch.int32) * 256 + 242) // 243).to(torch.uint8)


def unpack_trits5(packed: Tensor, n: int) -> Tensor:
    """Return the n codes of each row that `pack_trits5` packed, [.., n] int8."""
    places = []
    rest = packed
    for _ in range(5):
        places.append(((rest.to(torch.int16) * 3) >> 8).to(torch.uint8))
        rest = rest * 3  # wraps: the digit that has been read goes
    return _codes(places, n)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes: code j of a row has the bits from `bits` j on, counted from the lowest of the first byte.

    Args:
        codes: [.., n] uint8 below 2^bits.
        bits: 1 to 8.

    Returns:
        [.., ceil(n bits / 8)] uint8.
    """
    if bits == 8:
        return codes.clone()
    n = codes.shape[-1]
    groups = _grouped(codes, _GROUP)
    word = torch.zeros(groups.shape[:-1], dtype=torch.int64, device=groups.device)
    for place in range(_GROUP):
        word |= groups[..., place].to(torch.int64) << (bits * place)
    packed = torch.stack([((word >> (8 * byte)) & 255).to(torch.uint8) for byte in range(bits)], -1)
    return packed.flatten(-2)[..., : -(-n * bits // 8)]


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return the n codes of each row that `pack_bits` packed, [.., n] uint8."""
    if bits == 8:
        return packed[..., :n].clone()
    groups = _grouped(packed, bits)
    word = torch.zeros(groups.shape[:-1], dtype=torch.int64, device=groups.device)
    for byte in range(bits):
        word |= groups[..., byte].to(torch.int64) << (8 * byte)
    mask = 2**bits - 1
    codes = torch.stack([((word >> (bits * place)) & mask).to(torch.uint8) for place in range(_GROUP)], -1)
    return codes.flatten(-2)[..., :n]


def _digits(codes: Tensor, size: int) -> Tensor:
    """[.., n] codes as [.., ceil(n / size), size] digits 0, 1, 2, uint8; what is missing are codes of 0."""
    return (_grouped(codes, size) + 1).to(torch.uint8)


def _codes(places: list[Tensor], n: int) -> Tensor:
    """The n codes whose digits are given place by place."""
    return torch.stack(places, -1).flatten(-2)[..., :n].to(torch.int8) - 1


def _grouped(values: Tensor, size: int) -> Tensor:
    """[.., n] as [.., ceil(n / size), size], filled up with zeros."""
    missing = -values.shape[-1] % size
    filled = F.pad(values, (0, missing)) if missing else values
    grouped: Tensor = filled.unflatten(-1, (-1, size))
    return grouped
