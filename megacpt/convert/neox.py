"""Checkpoints of the GPT-NeoX library: one file a layer and tensor-parallel rank, or one a rank.

Facts of GPT-NeoX 2.0: layers are numbered as in its list of modules, the embedding as 0, blocks from 2 on, the last
norm and the head behind them; each rank keeps its rows or columns of a matrix, a part of the sum of the biases that are
added after such columns, and a copy of each norm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from megatron.core.safe_globals import SAFE_GLOBALS
from torch import Tensor

from megacpt.config import load_model
from megacpt.convert.families.gpt_neox import GPT_NEOX
from megacpt.convert.families.settings import Settings
from megacpt.convert.foreign import Foreign, exact_multiple
from megacpt.convert.matching import check_tensors
from megacpt.convert.weight_files import Stored, WeightFiles
from megacpt.errors import CheckpointError, ConfigError

_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_IN_RANK_FILE = re.compile(r"sequential\.(\d+)\.(.+)")
_FIRST_BLOCK = 2
How = Literal["rows", "columns", "sum", "mean"]
# Of a block: what ends the name, in either of NeoX's namings, the name in the family, and how ranks share the tensor.
_BLOCK: Mapping[str, tuple[str, How]] = {
    "input_layernorm.weight": ("input_layernorm.weight", "mean"),
    "input_layernorm.bias": ("input_layernorm.bias", "mean"),
    "post_attention_layernorm.weight": ("post_attention_layernorm.weight", "mean"),
    "post_attention_layernorm.bias": ("post_attention_layernorm.bias", "mean"),
    "attention.query_key_value.weight": ("attention.query_key_value.weight", "rows"),
    "attention.query_key_value.bias": ("attention.query_key_value.bias", "rows"),
    "attention.dense.weight": ("attention.dense.weight", "columns"),
    "attention.dense.bias": ("attention.dense.bias", "sum"),
    "mlp.dense_h_to_4h.weight": ("mlp.dense_h_to_4h.weight", "rows"),
    "mlp.dense_h_to_4h.bias": ("mlp.dense_h_to_4h.bias", "rows"),
    "mlp.dense_4h_to_h.weight": ("mlp.dense_4h_to_h.weight", "columns"),
    "mlp.dense_4h_to_h.bias": ("mlp.dense_4h_to_h.bias", "sum"),
    "mlp.linear1.weight": ("mlp.dense_h_to_4h.weight", "rows"),
    "mlp.linear1.bias": ("mlp.dense_h_to_4h.bias", "rows"),
    "mlp.linear2.weight": ("mlp.dense_4h_to_h.weight", "columns"),
    "mlp.linear2.bias": ("mlp.dense_4h_to_h.bias", "sum"),
}
_OUTSIDE: Mapping[str, tuple[str, How]] = {
    "word_embeddings.weight": (f"{GPT_NEOX.embedding}.weight", "rows"),
    "norm.weight": (f"{GPT_NEOX.norm}.weight", "mean"),
    "norm.bias": (f"{GPT_NEOX.norm}.bias", "mean"),
    "final_linear.weight": (f"{GPT_NEOX.head}.weight", "rows"),
}
_IGNORED = ("attention.rotary_emb.inv_freq",)
# Settings that change what is computed, with the values at which a GPT-NeoX of Hugging Face is the same.
_ONLY: Mapping[str, tuple[object, ...]] = {
    "pos_emb": ("rotary",),
    "norm": (None, "layernorm"),
    "activation": (None, "gelu"),
    "gpt_j_tied": (None, False),
    "num_kv_heads": (None,),
    "use_bias_in_attn_linear": (None, True),
    "use_bias_in_norms": (None, True),
    "moe_num_experts": (None, 1),
    "apply_query_key_layer_scaling": (None, False),
    "attention_config": (None,),
    "rope_fusion": (None, False, True),
}


@dataclass(frozen=True)
class _Part:
    """What one rank has of a tensor: its file, and its key there."""

    file: Path
    key: str


class NeoxFiles(WeightFiles):
    """The tensors of a checkpoint of GPT-NeoX, joined over its ranks, under the names of Hugging Face's GPT-NeoX.

    Args:
        folder: ``global_stepN``.

    Raises:
        CheckpointError: a rank or a file is missing or damaged, or a tensor is unknown; names it.
    """

    def __init__(self, folder: Path) -> None:
        self._parts: dict[str, list[_Part]] = {}
        self._how: dict[str, How] = {}
        self.files = tuple(sorted(path for path in folder.glob("*.pt") if _LAYER_FILE.fullmatch(path.name)))
        if self.files:
            self._layer_files()
        else:
            self.files = tuple(sorted(path for path in folder.glob("*.pt") if _RANK_FILE.fullmatch(path.name)))
            self._rank_files()
        if not self._parts:
            raise CheckpointError(
                f"{folder} holds neither layer_00-model_00-model_states.pt nor mp_rank_00_model_states.pt: give a "
                "folder global_stepN of GPT-NeoX"
            )
        self.tensors = {name: self._joined(name) for name in self._parts}

    def _layer_files(self) -> None:
        places = {path: _LAYER_FILE.fullmatch(path.name) for path in self.files}
        ranks = 1 + max(int(match[2]) for match in places.values() if match)
        for path, match in places.items():
            assert match is not None
            for key in _loaded(path):
                self._add(int(match[1]), key, _Part(path, key))
        self._complete(ranks)

    def _rank_files(self) -> None:
        for path in self.files:
            for key in _loaded(path):
                match = _IN_RANK_FILE.fullmatch(key)
                if match is None:
                    raise CheckpointError(f"{path}: {key} is no tensor of a sequential model of GPT-NeoX")
                self._add(int(match[1]), match[2], _Part(path, key))
        self._complete(len(self.files))

    def _add(self, number: int, key: str, part: _Part) -> None:
        """Take a rank's part of a tensor in."""
        if key.endswith(_IGNORED):
            return
        if key in _OUTSIDE:
            name, how = _OUTSIDE[key]
        elif key in _BLOCK:
            end, how = _BLOCK[key]
            name = f"{GPT_NEOX.layer.format(number - _FIRST_BLOCK)}.{end}"
        else:
            raise CheckpointError(f"{part.file}: {key} is no tensor of a GPT-NeoX")
        self._parts.setdefault(name, []).append(part)
        self._how[name] = how

    def _complete(self, ranks: int) -> None:
        for name, parts in self._parts.items():
            if len(parts) != ranks:
                where = parts[0].file.parent
                raise CheckpointError(f"{where}: {name} is there for {len(parts)} of {ranks} tensor-parallel ranks")

    def _joined(self, name: str) -> Stored:
        parts = [_loaded(part.file)[part.key] for part in self._parts[name]]
        shape, how = list(parts[0].shape), self._how[name]
        if any(part.shape != parts[0].shape for part in parts):
            raise CheckpointError(f"{self._parts[name][0].file.parent}: ranks have {name} in different shapes")
        if how in ("rows", "columns"):
            shape[0 if how == "rows" else 1] *= len(parts)
        return Stored(self._parts[name][0].file, parts[0].dtype, tuple(shape))

    def _read(self, name: str, stored: Stored, first: int, count: int) -> Tensor:
        parts = [_loaded(part.file)[part.key] for part in self._parts[name]]
        how = self._how[name]
        if how == "rows":
            each = stored.shape[0] // len(parts)
            cut = [
                part[max(first - rank * each, 0) : max(first + count - rank * each, 0)]
                for rank, part in enumerate(parts)
            ]
            return torch.cat(cut)
        rows = [part[first : first + count] for part in parts]
        if how == "columns":
            return torch.cat(rows, 1)
        total = torch.stack([part.double() for part in rows]).sum(0)
        return (total / (len(rows) if how == "mean" else 1)).to(stored.dtype)


def open_neox(folder: Path, settings: Path | None = None, allow_pickle: bool = False) -> Foreign:
    """Look at a checkpoint of GPT-NeoX, and compare its tensors with the network that its settings describe.

    Args:
        folder: ``global_stepN``.
        settings: a YAML file of the run, or a folder of them; None for ``configs`` in the folder.
        allow_pickle: its files are those of ``torch.save``; they are read by an unpickler that knows tensors and plain
            settings only.

    Raises:
        ConfigError: `allow_pickle` is not set, settings are missing, or ask for what no network here has.
        CheckpointError: a file is damaged, or tensors do not fit.
    """
    if not allow_pickle:
        raise ConfigError(
            f"{folder}: checkpoints of GPT-NeoX are pickles, which can run code when they are read; --allow-pickle "
            "reads tensors and plain settings out of them, and nothing else"
        )
    given = _settings(folder / "configs" if settings is None else settings)
    weights = NeoxFiles(folder)
    table = weights.tensors.get(f"{GPT_NEOX.embedding}.weight")
    if table is None:
        raise CheckpointError(f"{folder} holds no word_embeddings.weight: it is no checkpoint of a GPT-NeoX")
    rows = table.shape[0]
    described = Settings(_as_config(given, rows), str(settings or folder / "configs"))
    keys = GPT_NEOX.read(described) | {"name": folder.resolve().name, "vocab_multiple": exact_multiple(rows)}
    described.check()
    network = load_model(keys)
    sources = tuple(GPT_NEOX.sources(network, rows, rows))
    notes = [*described.notes, *check_tensors(weights, sources, {})]
    if given.get("bias_gelu_fusion"):
        notes.append("bias_gelu_fusion: trained with GELU's approximation by tanh, and computed exactly here")
    digest = sha256(repr(sorted(given.items(), key=str)).encode()).hexdigest()
    return Foreign(folder, GPT_NEOX, network, _as_config(given, rows), weights, sources, tuple(notes), {}, digest)


def _settings(path: Path) -> dict[str, Any]:
    """Return the settings of a run, with underscores in their names."""
    files = sorted([*path.glob("*.yml"), *path.glob("*.yaml")]) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ConfigError(f"{path} holds no settings of GPT-NeoX: name its YAML file with --config")
    found: dict[str, Any] = {}
    for file in files:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is no YAML file: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{file} holds no settings by name")
        found.update({str(key).replace("-", "_"): value for key, value in content.items()})
    return found


def _as_config(given: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return settings of GPT-NeoX as config.json of Hugging Face's.

    Raises:
        ConfigError: names every setting that asks for something else than a GPT-NeoX.
    """
    wrong = [f"{key}: {given[key]}" for key, allowed in _ONLY.items() if given.get(key, allowed[0]) not in allowed]
    if "pos_emb" not in given:
        wrong.append("pos_emb: learned positions, which it is where nothing is said")
    missing = [f"{key} is missing" for key in ("num_layers", "hidden_size", "num_attention_heads") if key not in given]
    if wrong or missing:
        raise ConfigError("the settings of GPT-NeoX ask for what is not read:\n" + "\n".join([*wrong, *missing]))
    return {
        "model_type": GPT_NEOX.name,
        "vocab_size": rows,
        "hidden_size": given["hidden_size"],
        "num_hidden_layers": given["num_layers"],
        "num_attention_heads": given["num_attention_heads"],
        "intermediate_size": given.get("intermediate_size") or 4 * given["hidden_size"],
        "max_position_embeddings": given.get("max_position_embeddings", 2048),
        "hidden_act": "gelu",
        "attention_bias": True,
        "layer_norm_eps": given.get("layernorm_epsilon", 1e-5),
        "rotary_pct": given.get("rotary_pct", 1.0),
        "rotary_emb_base": given.get("rotary_emb_base", 10000),
        "use_parallel_residual": bool(given.get("gpt_j_residual", False)),
        "tie_word_embeddings": not given.get("no_weight_tying", False),
        "initializer_range": given.get("init_method_std", 0.02),
    }


@lru_cache(maxsize=64)
def _loaded(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped; those of a rank's file are its ``module``."""
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can raise anything
        text = str(error).strip().splitlines()
        why = text[0] if text else repr(error)
        raise CheckpointError(f"{path} is damaged, or holds more than tensors and plain settings: {why}") from error
    found = content.get("module", content) if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path} holds no tensors by name")
    return found
