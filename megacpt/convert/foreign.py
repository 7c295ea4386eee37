"""A folder of Hugging Face, opened: its family, the network, and what of its description was not understood."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from megacpt.config import ModelConfig, load_model
from megacpt.convert.families import FAMILIES, Family, Source
from megacpt.convert.families.settings import Settings
from megacpt.convert.matching import check_tensors
from megacpt.convert.packed_folder import CONFIG, METHOD
from megacpt.convert.weight_files import BLOCK, WeightFiles, open_weights
from megacpt.errors import CheckpointError, ConfigError, nearest

_LARGEST_MULTIPLE = 128


@dataclass(frozen=True)
class Foreign:
    """A model of another program.

    Attributes:
        folder: where it lies.
        family: of the model.
        model: the network.
        settings: content of its config.json.
        weights: its tensors.
        sources: ours, and what of theirs each is made of.
        notes: what a person should know of the conversion.
        unknown: keys of config.json that nothing here understands, with their values.
        sha256: of config.json.
    """

    folder: Path
    family: Family
    model: ModelConfig
    settings: dict[str, Any]
    weights: WeightFiles
    sources: tuple[Source, ...]
    notes: tuple[str, ...]
    unknown: dict[str, Any]
    sha256: str

    @property
    def rows(self) -> int:
        """Of the embedding."""
        assert self.model.vocab_size is not None
        return self.model.vocab_size


def open_foreign(folder: Path, allow_pickle: bool = False) -> Foreign:
    """Read what a folder says of a model, and compare it with what the headers of its files say; reads no weights.

    Args:
        folder: with config.json and weights.
        allow_pickle: see `open_weights`.

    Raises:
        ConfigError: the family is unknown, or the model has what no network here has; names every key.
        CheckpointError: a file is missing or damaged, or tensors do not fit; names every one.
    """
    path = folder / CONFIG
    content = _read(folder, path)
    values: dict[str, Any] = content[0]
    kind = values.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"{path}: model_type {kind}{nearest(str(kind), FAMILIES)} is no family here: {known}")
    settings = Settings(values, str(path))
    _quantisation(settings)
    try:
        keys = {**family.read(settings), "name": folder.resolve().name}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: a key is missing or no number ({error!r})") from error
    settings.check()
    keys["vocab_multiple"] = exact_multiple(keys["vocab_size"])
    model = load_model(keys)
    weights = open_weights(folder, allow_pickle, family.stacked)
    sources = tuple(family.sources(model, keys["vocab_size"], keys["vocab_size"]))
    ignored = dict(family.ignored(model))
    if model.tied_embeddings:
        ignored[f"{family.head}.weight".replace(".", r"\.")] = "the output projection, which is the embedding"
    left_out = check_tensors(weights, sources, ignored)
    notes = (*settings.notes, *left_out, *_vocabulary(model))
    return Foreign(folder, family, model, values, weights, sources, notes, settings.unknown(), content[1])


def _read(folder: Path, path: Path) -> tuple[dict[str, Any], str]:
    """Return the content of config.json, and its hash."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give one with {CONFIG} and *.safetensors, downloaded before")
    try:
        content = path.read_bytes()
        values = json.loads(content)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): it says what the network is") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return values, sha256(content).hexdigest()


def _quantisation(settings: Settings) -> None:
    """Refuse forms of weights that are not read."""
    found = settings.get("quantization_config")
    if found is None:
        return
    method = found.get("quant_method")
    if method == METHOD:
        settings.refuse("quantization_config", method, "a packed model is not trained on: take the run it was made of")
    elif method == "bitnet":
        why = (
            "each projection has a scale of its own, and here queries, keys and values are one matrix. Without this "
            "key the full weights are converted as they are"
        )
        settings.refuse("quantization_config", method, why)
    elif method == "fp8" and list(found.get("weight_block_size") or ()) == [BLOCK, BLOCK]:
        settings.notes.append("quantization_config: fp8: weights are multiplied with the scales of their blocks")
    else:
        settings.refuse("quantization_config", method, "weights in this form are not read; take those in 16 or 32 bits")


def exact_multiple(rows: int) -> int:
    """The largest power of two, to 128, that divides the rows of the embedding: so nothing is padded."""
    return min(rows & -rows, _LARGEST_MULTIPLE)


def _vocabulary(model: ModelConfig) -> list[str]:
    if model.vocab_multiple >= 8:
        return []
    return [
        f"vocab_size: {model.vocab_size}: rows are taken as they are, and tensor parallelism has to divide them; "
        "`megacpt convert resize-vocab` pads them"
    ]
