"""A GGUF file, written one tensor at a time and read back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megacpt.convert.output import digest_of
from megacpt.data.files import sync
from megacpt.errors import CheckpointError, SetupError

Rows = Iterable[np.ndarray[Any, Any]]


def gguf_package() -> Any:
    """Return the package gguf.

    Raises:
        SetupError: if it is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise SetupError(
            "GGUF files need the package gguf: pip install 'megacpt[gguf]' (or pip install gguf)"
        ) from error
    return gguf


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor that will be written.

    Attributes:
        name: in the file.
        shape: [rows, columns], or [n].
        type: gguf's name of how its numbers are kept, such as ``TQ2_0``.
    """

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def quantisation(self) -> Any:
        """Gguf's type."""
        return gguf_package().GGMLQuantizationType[self.type]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        size, width = gguf_package().GGML_QUANT_SIZES[self.quantisation]
        return int(np.prod(self.shape)) // int(size) * int(width)


class GGUFFile:
    """Writes the planned tensors, in their order, behind the metadata.

    Args:
        path: a new file.
        writer: a GGUFWriter for it that has been told all metadata and nothing of tensors.
        plan: every tensor.
    """

    def __init__(self, path: Path, writer: Any, plan: Sequence[GGUFTensor]) -> None:
        self._path, self._writer, self._plan = path, writer, plan
        self._written: list[_Streamed] = []
        for one in plan:
            writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), one.bytes, one.quantisation)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()

    def write(self, parts: Rows) -> None:
        """Write the next tensor.

        Args:
            parts: its rows in order, some at a time, [n, columns] or [n] float32.
        """
        planned = self._plan[len(self._written)]
        streamed = _Streamed(planned.bytes, (_converted(part, planned) for part in parts))
        self._writer.write_tensor_data(streamed)
        self._written.append(streamed)

    def finish(self) -> None:
        """Flush the file, and compare what is on disk with what was written.

        Raises:
            CheckpointError: if it differs.
        """
        self._writer.close()
        sync(self._path)
        for one, written in zip(self._plan, self._written, strict=True):
            if digest_of(self._path, written.start, one.bytes) != written.digest.digest():
                raise CheckpointError(f"{self._path} does not hold what was written to it ({one.name})")


def _converted(part: np.ndarray[Any, Any], planned: GGUFTensor) -> np.ndarray[Any, Any]:
    if planned.type == "F32":
        return part
    if planned.type == "F16":
        return part.astype(np.float16)
    found: np.ndarray[Any, Any] = gguf_package().quants.quantize(part, planned.quantisation)
    return found


class _Streamed:
    """What GGUFWriter takes for an array: it is asked for its size, and to write itself to a file."""

    def __init__(self, size: int, parts: Iterator[np.ndarray[Any, Any]]) -> None:
        self.nbytes = size
        self.start = 0
        self.digest = hashlib.sha256()
        self._parts = parts

    def tofile(self, file: BinaryIO) -> None:
        """Write everything, a part at a time."""
        self.start = file.tell()
        for part in self._parts:
            block = np.ascontiguousarray(part).view(np.uint8).data
            self.digest.update(block)
            file.write(block)
