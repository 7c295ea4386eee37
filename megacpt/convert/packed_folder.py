"""Reading a packed folder: codes, scales and the other weights of a model, with what it takes to run it.

Names are those of Hugging Face's Llama. A quantised ``X.weight`` is stored as ``X.weight_packed``, uint8 [o, bytes of a
row], and ``X.weight_scale``, [R, C].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacpt.config import ModelConfig
from megacpt.convert.families import LLAMA
from megacpt.convert.packed_format import FORMATS
from megacpt.convert.safetensors_writer import INDEX
from megacpt.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from megacpt.errors import CheckpointError
from megacpt.quant.matrix import Quantised

CONFIG = "config.json"
METHOD = "megacpt"
PACKED, SCALE = "_packed", "_scale"


class PackedFolder:
    """A folder of ``megacpt convert pack``.

    Args:
        path: the folder.

    Attributes:
        path: the folder.
        config: content of config.json.
        model: the network.
        format: how codes are packed.
        activations: what those of the packed layers were rounded to in training; None for nothing.

    Raises:
        CheckpointError: it is no packed folder, or a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read(path / CONFIG)
        quantisation = self.config.get("quantization_config")
        if not isinstance(quantisation, dict) or quantisation.get("quant_method") != METHOD:
            raise CheckpointError(
                f"{path} is no folder of `megacpt convert pack`: its {CONFIG} names no packed weights"
            )
        name = quantisation.get("format")
        if name not in FORMATS:
            raise CheckpointError(f"{path / CONFIG}: format {name!r} is unknown; it is of a newer megacpt, or damaged")
        self.format = FORMATS[name]
        try:
            self.model = ModelConfig.model_validate(self._own("model"))
            self.activations = _activations(quantisation["activations"])
            rows = int(self.config["vocab_size"])
            self._files: dict[str, str] = {
                name: inside(file) for name, file in _read(path / INDEX)["weight_map"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {CONFIG} or {INDEX} lacks or misstates {error}") from error
        sources = LLAMA.sources(self.model, rows, rows)
        self._shapes = {target.name: target.shape for source in sources for target in source.targets}
        missing = [name for name in self._shapes if name not in self._files and name + PACKED not in self._files]
        if missing:
            raise CheckpointError(f"{path / INDEX} lacks {missing[0]}, which the model of {CONFIG} has")
        self._opened: dict[str, Any] = {}

    def names(self) -> list[str]:
        """Return the names of all tensors, quantised or not, in the order of the model."""
        return list(self._shapes)

    def is_quantised(self, name: str) -> bool:
        """Return whether a tensor is stored as codes and scales."""
        return name + PACKED in self._files

    def tensor(self, name: str) -> Tensor:
        """Return a tensor that is stored as it is.

        Raises:
            CheckpointError: if there is none, or its file is damaged.
        """
        found = self._load(name)
        if tuple(found.shape) != self._shapes.get(name):
            raise CheckpointError(
                f"{self.path}: {name} is {list(found.shape)}, not of the model that {CONFIG} describes"
            )
        return found

    def quantised(self, name: str) -> Quantised:
        """Return the codes and scales of a matrix.

        Raises:
            CheckpointError: if there is none, or its file is damaged.
        """
        packed, scales = self._load(name + PACKED), self._load(name + SCALE)
        rows, columns = self._shapes[name]
        due = (rows, self.format.row_bytes(columns))
        fits = scales.dim() == len(due) and scales.numel() > 0
        if tuple(packed.shape) != due or not fits or rows % scales.shape[0] or columns % scales.shape[1]:
            raise CheckpointError(f"{self.path}: {name} is not of the model that {CONFIG} describes")
        return Quantised(self.format.unpack(packed, columns), scales.float())

    def stored_bytes(self) -> dict[str, tuple[int, int, int]]:
        """Return for every tensor how many numbers it has, and the bytes of them and of their scales."""
        return {
            name: (
                torch.Size(shape).numel(),
                self._size(name + PACKED if self.is_quantised(name) else name),
                self._size(name + SCALE) if self.is_quantised(name) else 0,
            )
            for name, shape in self._shapes.items()
        }

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the model was trained with.

        Raises:
            CheckpointError: if it is another.
        """
        record = self._own("tokenizer")
        try:
            file, fingerprint = record["file"], record["fingerprint"]
            found = load_tokenizer(BYTES if file is None else self.path / inside(file))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path / CONFIG} is damaged: {METHOD}.tokenizer lacks {error}") from error
        if found.fingerprint != fingerprint:
            raise CheckpointError(f"the tokenizer in {self.path} is not the one that the model was trained with")
        return found

    def _own(self, key: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self.config[METHOD][key]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path / CONFIG} lacks {METHOD}.{key}: it is damaged") from error
        return found

    def _size(self, name: str) -> int:
        view = self._open(name).get_slice(name)
        width = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}[view.get_dtype()]
        return width * torch.Size(view.get_shape()).numel()

    def _load(self, name: str) -> Tensor:
        try:
            found: Tensor = self._open(name).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path / self._files[name]} is damaged: {error}") from error
        return found

    def _open(self, name: str) -> Any:
        """The file that holds a tensor, which is mapped and not read."""
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(f"{self.path} holds no {name}")
        if file not in self._opened:
            try:
                self._opened[file] = safe_open(str(self.path / file), framework="pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.path / file} is missing or damaged: {error}") from error
        return self._opened[file]


def inside(file: str) -> str:
    """Return the name of a file that lies in the folder itself, and no path out of it."""
    if Path(file).name != file:
        raise ValueError(f"{file!r}, which is no name of a file in the folder")
    return file


def is_packed_folder(path: Path) -> bool:
    """Return whether a path is a folder of ``megacpt convert pack``."""
    if not (path / CONFIG).is_file():
        return False
    found = _read(path / CONFIG).get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def _activations(value: object) -> Literal["int8", "fp8"] | None:
    if value is None:
        return None
    if value == "int8":
        return "int8"
    if value == "fp8":
        return "fp8"
    raise ValueError(f"activations {value!r}")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return found
