"""Checkpoints of Megatron-LM and Megatron Core (format ``torch_dist``): read as a run folder, and written.

Both sides keep the same numbers in the same shapes, so that only names differ (`megatron_names`). Nothing is gathered.
"""

from __future__ import annotations

import pickle
from argparse import Namespace
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from megatron.core.safe_globals import SAFE_GLOBALS
from torch import Tensor

from megacpt.checkpoint.block_writer import write_pieces
from megacpt.checkpoint.pieces import COMMON, LAYERS, Piece, PieceReader
from megacpt.checkpoint.store import find_checkpoint, verify
from megacpt.checkpoint.tensors import METADATA
from megacpt.config import ModelConfig, load_model, load_run
from megacpt.continuation.boundary import RUN
from megacpt.continuation.ledger import LEDGER, Ledger
from megacpt.convert.derived import Progress, counted
from megacpt.convert.families.megatron import MEGATRON
from megacpt.convert.foreign import Foreign, exact_multiple
from megacpt.convert.matching import check_tensors
from megacpt.convert.megatron_names import arguments, model_keys, names_here, to_theirs
from megacpt.convert.output import appearing
from megacpt.convert.weight_files import Stored, WeightFiles
from megacpt.convert.weights import DTYPES
from megacpt.data.files import sync
from megacpt.errors import CheckpointError, ConfigError
from megacpt.runtime.layout import start_process_group

LATEST = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # Megatron's word for weights that no iteration made
_EMBEDDING = "embedding.word_embeddings.weight"
_MASTER = "optimizer.state.fp32_param."


def to_megatron(checkpoint: Path, out: Path, dtype: str | None = None, progress: Progress | None = None) -> None:
    """Write a checkpoint's weights as Megatron-LM loads them with ``--load OUT``, in any layout.

    Args:
        checkpoint: a checkpoint, or a run folder for its newest.
        out: a new folder, with the checkpoint in ``release`` and Megatron's file that names it.
        dtype: of the weights; None for what the run computes in.
        progress: told after each block: how many are written, and how many there are.

    Raises:
        ConfigError: Megatron's GPT model does not compute this network, with every key; `out` exists.
        CheckpointError: the checkpoint is damaged, or the disk fails.
    """
    start_process_group()
    folder = find_checkpoint(checkpoint)
    verify(folder)
    config, ledger = load_run(folder / RUN), Ledger.read(folder)
    MEGATRON.check(config.model)
    if config.model.quantise is not None:
        raise ConfigError("model.quantise: Megatron would multiply with the latent weights, which is another function")
    reader = PieceReader(folder)
    kept = DTYPES[config.precision if dtype is None else dtype]
    renamed = {theirs: piece for piece in reader.pieces() for theirs in _renamed(piece, config.model, kept)}
    read = counted(lambda piece: reader.read(renamed[piece]).to(piece.dtype), len(renamed), progress)
    with appearing(out) as temporary:
        place = temporary / RELEASE
        place.mkdir(parents=True)
        write_pieces(place, list(renamed), read)
        args = arguments(config.model, reader.shapes()[_EMBEDDING][0])
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 0}, place / COMMON)
        (place / LEDGER).write_text(ledger.to_json(), encoding="utf-8")
        (temporary / LATEST).write_text(RELEASE, encoding="utf-8")
        for path in (*place.iterdir(), place, temporary / LATEST, temporary):
            sync(path)


def _renamed(piece: Piece, model: ModelConfig, dtype: torch.dtype) -> list[Piece]:
    """Return what a block of ours is in Megatron's checkpoint; nothing for a state that Megatron does not have."""
    rest = piece.name.removeprefix(LAYERS)
    if rest == piece.name:
        return [replace(piece, dtype=dtype)]
    number, _, suffix = rest.partition(".")
    stacked = not number.isdigit()
    if not stacked and suffix.endswith("choice_bias"):
        if model.moe is None or model.moe.balance.kind != "bias":
            return []
        dtype = piece.dtype  # float32 there too, whatever the model is
    prefix = LAYERS if stacked else f"{LAYERS}{number}."
    names = to_theirs(rest if stacked else suffix, not stacked and model.moe_layers[int(number)])
    return [replace(piece, name=f"{prefix}{name}", dtype=dtype) for name in names]


class MegatronFiles(WeightFiles):
    """The weights of a checkpoint of Megatron's under our names; the optimizer's float32 copies where it has them.

    Args:
        folder: of an iteration.

    Raises:
        CheckpointError: it is damaged, or holds tensors that are none of a GPT model's.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = PieceReader(folder)
        everything = self._reader.shapes(weights_only=False)
        shapes = {name: shape for name, shape in everything.items() if "optimizer." not in name}
        self.masters = bool(shapes) and all(everything.get(_MASTER + name) == shape for name, shape in shapes.items())
        self._places = names_here(shapes, str(folder))
        self.files = (folder / METADATA,)
        self.tensors = {
            ours: Stored(folder / METADATA, self._dtype(theirs), everything[theirs][len(index) :])
            for ours, (theirs, index) in self._places.items()
        }

    def _dtype(self, name: str) -> torch.dtype:
        found: torch.dtype = self._reader.tensors[name].properties.dtype
        return found

    def _read(self, name: str, stored: Stored, first: int, count: int) -> Tensor:
        theirs, index = self._places[name]
        shape = (*self._reader.shapes()[theirs],)
        inner = (count, *stored.shape[1:])
        offsets = (*index, first, *[0] * (len(stored.shape) - 1))
        source = f"{_MASTER}{theirs}" if self.masters else theirs
        piece = Piece(source, offsets, (*[1] * len(index), *inner), shape, stored.dtype)
        return self._reader.read(piece).view(inner)


def open_megatron(source: Path, model: str | None = None) -> Foreign:
    """Look at a checkpoint of Megatron's, and compare its tensors with the network that its arguments describe.

    Args:
        source: the folder that Megatron saved to, or one iteration's.
        model: a name from configs/models or a YAML file, for a checkpoint without Megatron-LM's arguments.

    Raises:
        ConfigError: the arguments are missing, or ask for what no network here has; names every one.
        CheckpointError: the checkpoint is damaged, of another format, or tensors do not fit.
    """
    folder = _iteration(source)
    weights = MegatronFiles(folder)
    if _EMBEDDING not in weights.tensors:
        raise CheckpointError(f"{folder} holds no {_EMBEDDING}: it is no checkpoint of a GPT model")
    rows = weights.tensors[_EMBEDDING].shape[0]
    given: dict[str, Any] = {} if model is not None else _arguments(folder)
    keys = model_keys(given) if model is None else load_model(model).model_dump()
    keys |= {"name": source.resolve().name, "vocab_size": rows, "vocab_multiple": exact_multiple(rows)}
    network = load_model(keys)
    MEGATRON.check(network)
    sources = tuple(MEGATRON.sources(network, rows, rows))
    notes = check_tensors(weights, sources, {})
    if weights.masters:
        notes.append("weights are taken from the optimizer's float32 copies")
    digest = sha256((folder / METADATA).read_bytes()).hexdigest()
    return Foreign(folder, MEGATRON, network, {}, weights, sources, tuple(notes), {}, digest)


def _iteration(source: Path) -> Path:
    """Return the folder of the iteration that a path means."""
    if (source / METADATA).is_file():
        return source
    latest = source / LATEST
    if not latest.is_file():
        raise CheckpointError(
            f"{source} holds neither {LATEST} nor {METADATA}: give the folder that Megatron saved to, in the format "
            "torch_dist, or one of its iterations"
        )
    word = latest.read_text(encoding="utf-8").strip()
    folder = source / (f"iter_{int(word):07d}" if word.isdigit() else RELEASE)
    if not (folder / METADATA).is_file():
        raise CheckpointError(f"{latest} names {word!r}, and {folder} holds no checkpoint in the format torch_dist")
    return folder


def _arguments(folder: Path) -> dict[str, Any]:
    """Return the arguments of Megatron-LM that a checkpoint carries; no foreign code runs."""
    path = folder / COMMON
    advice = "name the network with --model, a name from configs/models or a YAML file"
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            common = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {folder} is no complete checkpoint") from error
    except pickle.UnpicklingError as error:
        text = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path} holds more than plain settings, and is not loaded ({text}): {advice}") from error
    found = common.get("args") if isinstance(common, dict) else None
    if not isinstance(found, Namespace):
        raise ConfigError(f"{path} holds no arguments of Megatron-LM: {advice}")
    return vars(found)
