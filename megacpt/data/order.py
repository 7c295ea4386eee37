"""The order of samples: a keyed permutation that is computed, never stored.

A Feistel network is a bijection on its power-of-two domain whatever its round function is; walking its cycle
until the value falls below `windows` restricts it to a bijection on exactly the windows there are (Black and
Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). Cost and memory do not grow with the stream.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

import numpy as np

_MASK64 = (1 << 64) - 1
_MULTIPLIER_A = 0x9E3779B97F4A7C15
_MULTIPLIER_B = 0xD6E8FEB86659FD93
_ROUND_KEYS = struct.Struct("<8Q")
# Below 6 bits the halves are too narrow to reach every permutation of a handful of windows evenly.
_MIN_BITS = 6
# Up to this many ordinals, Python's own integers are quicker than arrays.
_FEW = 16


def derive_key(*parts: int | str) -> int:
    """Return a 63-bit key that depends on all `parts` and their order (BLAKE2b of their text)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class WindowOrder:
    """The endless order in which `windows` windows are visited under `key`.

    Ordinals ``epoch * windows + i`` with ``0 <= i < windows`` visit every window once in each epoch; every
    epoch has its own permutation.
    """

    __slots__ = ("_high_bits", "_low_bits", "key", "windows")

    def __init__(self, windows: int, key: int) -> None:
        if windows < 1:
            raise ValueError(f"an order needs at least one window, not {windows}")
        self.windows = windows
        self.key = key
        bits = max(_MIN_BITS, (windows - 1).bit_length())
        self._low_bits = bits // 2
        self._high_bits = bits - self._low_bits

    def window(self, ordinal: int) -> int:
        """Return the window, from 0 to ``windows - 1``, that stands at `ordinal` of the endless order."""
        if ordinal < 0:
            raise ValueError(f"ordinals start at 0, not {ordinal}")
        epoch, value = divmod(ordinal, self.windows)
        keys = self._round_keys(epoch)
        while True:
            value = self._permute(value, keys)
            if value < self.windows:
                return value

    def window_many(self, ordinals: np.ndarray) -> np.ndarray:
        """Return what `window` does, for `ordinals` int64 [n]: windows int64 [n]."""
        if len(ordinals) <= _FEW:
            return np.array([self.window(int(ordinal)) for ordinal in ordinals], np.int64)
        if ordinals.min() < 0:
            raise ValueError(f"ordinals start at 0, not {ordinals.min()}")
        epochs, values = np.divmod(ordinals, self.windows)
        found = np.empty(len(ordinals), np.int64)
        for epoch in np.unique(epochs):
            keys, here = self._round_keys(int(epoch)), np.flatnonzero(epochs == epoch)
            walking = values[here].view(np.uint64)
            while len(here):
                walking = self._permute_many(walking, keys)
                inside = walking < self.windows
                found[here[inside]] = walking[inside]
                here, walking = here[~inside], walking[~inside]
        return found

    def _round_keys(self, epoch: int) -> tuple[int, ...]:
        return _ROUND_KEYS.unpack(blake2b(b"%d:%d:%d" % (self.key, epoch, self.windows)).digest())

    def _permute(self, value: int, keys: tuple[int, ...]) -> int:
        """Eight alternating Feistel rounds over a low and a high half, which may differ by one bit."""
        low = value & ((1 << self._low_bits) - 1)
        high = value >> self._low_bits
        low_shift, high_shift = 64 - self._low_bits, 64 - self._high_bits
        for i in range(0, 8, 2):
            mixed = ((high + keys[i]) * _MULTIPLIER_A) & _MASK64
            mixed ^= mixed >> 31
            low ^= ((mixed * _MULTIPLIER_B) & _MASK64) >> low_shift
            mixed = ((low + keys[i + 1]) * _MULTIPLIER_A) & _MASK64
            mixed ^= mixed >> 31
            high ^= ((mixed * _MULTIPLIER_B) & _MASK64) >> high_shift
        return (high << self._low_bits) | low

    def _permute_many(self, values: np.ndarray, keys: tuple[int, ...]) -> np.ndarray:
        """Return what `_permute` does, for `values` uint64 [n]; sums and products wrap at 64 bits by themselves."""
        low, high = values & ((1 << self._low_bits) - 1), values >> self._low_bits
        for i in range(0, 8, 2):
            low = low ^ (_mixed(high, keys[i]) >> (64 - self._low_bits))
            high = high ^ (_mixed(low, keys[i + 1]) >> (64 - self._high_bits))
        return (high << self._low_bits) | low


def _mixed(half: np.ndarray, key: int) -> np.ndarray:
    mixed: np.ndarray = (half + np.uint64(key)) * np.uint64(_MULTIPLIER_A)
    mixed ^= mixed >> 31
    mixed *= np.uint64(_MULTIPLIER_B)
    return mixed
