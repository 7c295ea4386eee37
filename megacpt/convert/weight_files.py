"""The weight files of a folder of Hugging Face: what they hold, checked before it is read, and some rows at a time.

A safetensors file is the length of a JSON header (8 bytes, little-endian), the header with dtype, shape and place of
every tensor, and their numbers. Rows are read from their place into memory of their own: pages of a mapped file would
count as memory of the process for as long as the file is open.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacpt.convert.safetensors_writer import INDEX
from megacpt.errors import CheckpointError, ConfigError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SCALE = "_scale_inv"  # behind the name of a matrix in 8 bits: what each block of it is multiplied with
BLOCK = 128  # rows and columns of such a block
PICKLES = ("*.bin", "*.pt", "*.pth")
_ROWS = 2 << 20  # bytes that are read at a time
_LONGEST = 256 << 20  # bytes of a header


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: which.
        dtype: of its numbers.
        shape: of the tensor.
        start: its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFiles(ABC):
    """The tensors of a folder, by name.

    Attributes:
        tensors: all of them.
        files: the files that hold them.
    """

    tensors: Mapping[str, Stored]
    files: tuple[Path, ...]

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield a tensor some rows at a time, with the number of the first one; matrices in 8 bits as float32.

        Raises:
            CheckpointError: the file cannot be read, or a number is infinite or none.
        """
        stored = self.tensors[name]
        scales = self._scales(name)
        width = math.prod(stored.shape[1:])
        rows = max(BLOCK, _ROWS // max(width * stored.dtype.itemsize, 1) // BLOCK * BLOCK)
        for first in range(0, stored.shape[0], rows):
            block = self._read(name, stored, first, min(rows, stored.shape[0] - first))
            if scales is not None:
                block = _scaled(block, scales[first // BLOCK :])
            if not torch.isfinite(
                torch.stack(torch.aminmax(block))
            ).all():  # 20 times as fast as every number for itself
                raise CheckpointError(
                    f"{stored.file}: {name} holds numbers that are infinite or not a number, first in rows {first} to "
                    f"{first + len(block) - 1}: a model with them computes nothing; get the file again"
                )
            yield first, block

    def _scales(self, name: str) -> Tensor | None:
        stored = self.tensors.get(name + SCALE)
        return None if stored is None else self._read(name + SCALE, stored, 0, stored.shape[0]).float()

    @abstractmethod
    def _read(self, name: str, stored: Stored, first: int, count: int) -> Tensor:
        """Return `count` rows from the row `first` on."""


class SafetensorsFiles(WeightFiles):
    """Safetensors files: the one of a folder, or those of its index. Arguments and errors as `open_weights`."""

    def __init__(self, folder: Path, stacked: Mapping[str, tuple[str, ...]]) -> None:
        index = _index(folder / INDEX)
        names = sorted(set(index.values())) if index else sorted(path.name for path in folder.glob("*.safetensors"))
        self.files = tuple(folder / name for name in names)
        found: dict[str, Stored] = {}
        for path in self.files:
            found.update(_header(path))
        for name, file in index.items():
            if name not in found or found[name].file.name != file:
                raise CheckpointError(f"{folder / INDEX} says that {name} is in {file}, and it is not")
        self.tensors = dict(part for name, stored in found.items() for part in _apart(name, stored, stacked))

    def _read(self, name: str, stored: Stored, first: int, count: int) -> Tensor:
        size = stored.bytes // max(stored.shape[0], 1)
        block = torch.empty(count * size, dtype=torch.uint8)
        try:
            with stored.file.open("rb", buffering=0) as file:
                file.seek(stored.start + first * size)
                view, done = memoryview(block.numpy().data), 0
                while done < len(view) and (got := file.readinto(view[done:])):
                    done += got
        except OSError as error:
            raise CheckpointError(f"{stored.file} cannot be read: {error.strerror}") from error
        if done < count * size:
            raise CheckpointError(f"{stored.file} has become shorter while it was read: {name} is cut off")
        return block.view(stored.dtype).view(count, *stored.shape[1:])


class PickledFiles(WeightFiles):
    """Files of ``torch.save``, read by an unpickler that knows tensors only, and mapped. As `open_weights`."""

    def __init__(self, folder: Path) -> None:
        index = _index(folder / "pytorch_model.bin.index.json")
        names = sorted(set(index.values())) if index else sorted(path.name for path in _pickles(folder))
        self.files = tuple(folder / name for name in names)
        self._loaded: dict[str, Tensor] = {}
        found = {}
        for path in self.files:
            for name, tensor in _unpickled(path).items():
                self._loaded[name] = tensor
                found[name] = Stored(path, tensor.dtype, tuple(tensor.shape))
        self.tensors = found

    def _read(self, name: str, _: Stored, first: int, count: int) -> Tensor:
        return self._loaded[name][first : first + count]


def open_weights(
    folder: Path, allow_pickle: bool = False, stacked: Mapping[str, tuple[str, ...]] | None = None
) -> WeightFiles:
    """Look at the headers of the weight files of a folder.

    Args:
        folder: with ``*.safetensors`` files, or one such file with an index.
        allow_pickle: take files of ``torch.save``, where there are no others.
        stacked: see `Family`; such tensors of safetensors files appear as those that they are made of.

    Raises:
        CheckpointError: there are none, or a file is missing, cut off or damaged; names the file.
        ConfigError: there are only pickles, and `allow_pickle` is not set.
    """
    if (folder / INDEX).is_file() or any(folder.glob("*.safetensors")):
        return SafetensorsFiles(folder, stacked or {})
    pickles = _pickles(folder)
    if not pickles:
        raise CheckpointError(f"{folder} holds no weights: neither *.safetensors nor {INDEX}")
    if not allow_pickle:
        raise ConfigError(
            f"{folder} holds its weights as pickles only ({pickles[0].name}), which can run code when they are read. "
            "Take a safetensors version of the model if there is one; --allow-pickle reads tensors out of them, by "
            "torch's weights_only unpickler, and nothing else"
        )
    return PickledFiles(folder)


def _pickles(folder: Path) -> list[Path]:
    found = {path for pattern in PICKLES for path in folder.glob(pattern)}
    return sorted(path for path in found if path.name not in ("training_args.bin", "optimizer.pt", "scheduler.pt"))


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is damaged, or holds more than tensors: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no tensors by name")
    return content


def _index(path: Path) -> dict[str, str]:
    """Return in which file each tensor is; empty without an index."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())["weight_map"]
        outside = [file for file in found.values() if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: it has no weight_map of names and files ({error})") from error
    if outside:
        raise CheckpointError(f"{path} names {outside[0]!r}, which is no file of the folder")
    missing = sorted({file for file in found.values() if not (path.parent / file).is_file()})
    if missing:
        raise CheckpointError(f"{path.parent / missing[0]} is missing, and {path.name} says that it holds tensors")
    return dict(found)


def _header(path: Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file, all of whose bytes are there."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_LONGEST, size - 8):
                raise CheckpointError(
                    f"{path} is cut off or no safetensors file: its header would have {length:,} bytes"
                )
            content = json.loads(file.read(length))
        return {
            name: _stored(path, name, entry, 8 + length, size)
            for name, entry in content.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: its header is none of a safetensors file ({error})") from error


def _stored(path: Path, name: str, entry: Mapping[str, Any], start: int, size: int) -> Stored:
    first, end = entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(f"{path}: {name} is {entry['dtype']}, which is no dtype of weights here")
    found = Stored(path, dtype, tuple(entry["shape"]), start + first)
    if first < 0 or end - first != found.bytes:
        raise CheckpointError(f"{path} is damaged: {name} has {end - first:,} bytes, and {found.bytes:,} are due")
    if start + end > size:
        raise CheckpointError(
            f"{path} is cut off: it has {size:,} bytes, and {name} ends at byte {start + end:,}; get the file again"
        )
    return found


def _apart(name: str, stored: Stored, stacked: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors that lie one behind the other in a tensor [experts, rows of all, columns], or itself."""
    end = next((end for end in stacked if name.endswith(f".{end}")), None)
    parts = () if end is None else stacked[end]
    if end is None or any("{}" in part for part in parts) != (len(stored.shape) == 3):
        yield name, stored
        return
    prefix = name.removesuffix(end)
    experts, rows, *columns = stored.shape if len(stored.shape) == 3 else (1, *stored.shape)
    size = stored.bytes // experts // len(parts)
    for n, (expert, part) in enumerate(itertools.product(range(experts), parts)):
        one = replace(stored, shape=(rows // len(parts), *columns), start=stored.start + n * size)
        yield prefix + part.format(expert), one


def _scaled(block: Tensor, scales: Tensor) -> Tensor:
    """Multiply rows [r, c], which begin with a block, with the scales [blocks of r, blocks of c]."""
    rows, columns = block.shape
    wide = scales[: -(-rows // BLOCK)].repeat_interleave(BLOCK, 0)[:rows]
    return block.float() * wide.repeat_interleave(BLOCK, 1)[:, :columns]
