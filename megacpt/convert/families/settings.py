"""config.json, read key by key: what was understood, what was not, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megacpt.errors import ConfigError

if TYPE_CHECKING:
    from megacpt.config import ModelConfig
    from megacpt.convert.families.table import Family

# Keys that say nothing about what the network computes, or that are read elsewhere.
INERT = frozenset(
    (
        "architectures", "model_type", "_name_or_path", "name_or_path", "transformers_version", "auto_map", "dtype",
        "torch_dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "return_dict",
        "output_attentions", "output_hidden_states", "output_router_logits", "is_decoder", "is_encoder_decoder",
        "pretraining_tp", "router_jitter_noise", "classifier_dropout", "id2label", "label2id", "problem_type",
        "chunk_size_feed_forward", "_attn_implementation_autoset",
    )
)  # fmt: skip
ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu2": "relu2glu"}


class Settings:
    """The content of a config.json.

    Args:
        values: the content.
        where: the file, for messages.

    Attributes:
        notes: what a person should know of the conversion.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self.notes: list[str] = []
        self._read: set[str] = set()
        self._refused: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, `default` where it is missing or null."""
        self._read.add(key)
        found = self.values.get(key)
        return default if found is None else found

    def need(self, key: str) -> Any:
        """Return a value that has to be there.

        Raises:
            ConfigError: it is not.
        """
        found = self.get(key)
        if found is None:
            raise ConfigError(f"{self.where} lacks {key}, which says what the network is")
        return found

    def only(self, key: str, allowed: Sequence[Any], why: str, default: Any = None) -> Any:
        """Return a value that has to be one of some; another is refused, with the reason."""
        found = self.get(key, default)
        if found not in allowed:
            self.refuse(key, found, why)
        return found

    def refuse(self, key: str, value: Any, why: str) -> None:
        """Refuse a value; `check` raises."""
        self._refused.append(f"{key}: {value}: {why}")

    def note_dropout(self, *keys: str) -> None:
        """Say where the model was trained with dropout."""
        for key in keys:
            if self.get(key, 0.0):
                self.notes.append(f"{key}: {self.values[key]}: stages here train without dropout")

    def check(self) -> None:
        """Raise what was refused.

        Raises:
            ConfigError: every key, with the reason.
        """
        if self._refused:
            raise ConfigError(f"{self.where} describes a model that cannot be converted:\n" + "\n".join(self._refused))

    def unknown(self) -> dict[str, Any]:
        """Return the keys that nothing has read, with their values."""
        return {key: value for key, value in self.values.items() if key not in self._read and key not in INERT}


def common_keys(
    settings: Settings,
    *,
    eps: str = "rms_norm_eps",
    default_eps: float = 1e-6,
    base: float = 10000.0,
    share: float = 1.0,
    act: str = "silu",
) -> dict[str, Any]:
    """Return the keys of a `ModelConfig` that decoders of most families spell alike.

    Args:
        settings: of the family.
        eps: its name of the number that norms add.
        default_eps: that number, where the file does not say it, as the following.
        base: of its rotary positions.
        share: of a head that is rotated.
        act: its activation.
    """
    settings.note_dropout("attention_dropout", "hidden_dropout")
    heads = settings.need("num_attention_heads")
    found = settings.only("hidden_act", tuple(ACTIVATIONS), "no network here has this activation", act)
    return {
        "layers": settings.need("num_hidden_layers"),
        "hidden": settings.need("hidden_size"),
        "ffn": settings.need("intermediate_size"),
        "heads": heads,
        "kv_heads": settings.get("num_key_value_heads", heads),
        "head_dim": settings.get("head_dim", settings.need("hidden_size") // heads),
        "vocab_size": settings.need("vocab_size"),
        "max_seq_length": settings.need("max_position_embeddings"),
        "norm_eps": settings.get(eps, default_eps),
        "tied_embeddings": bool(settings.get("tie_word_embeddings", False)),
        "init_std": settings.get("initializer_range", 0.02),
        "rope": rope_keys(settings, base, share),
        "activation": ACTIVATIONS.get(found, "swiglu"),  # where it is none of them, `check` raises
    }


def rope_keys(settings: Settings, base: float, share: float) -> dict[str, Any]:
    """Return `model.rope`, of ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4)."""
    new, old = settings.get("rope_parameters", {}), settings.get("rope_scaling", {})
    found: dict[str, Any] = {**old, **new}
    for key in ("rotary_emb_base", "rope_theta"):
        base = settings.get(key, base)
    for key in ("rotary_pct", "partial_rotary_factor"):
        share = settings.get(key, share)
    return {
        "base": float(found.get("rope_theta", base)),
        "share": float(found.get("partial_rotary_factor", share)),
        "scaling": _scaling(settings, found),
    }


def _scaling(settings: Settings, found: Mapping[str, Any]) -> dict[str, Any] | None:
    key = "rope_parameters" if settings.get("rope_parameters") else "rope_scaling"
    kind = found.get("rope_type", found.get("type", "default"))
    length = found.get("original_max_position_embeddings", settings.get("original_max_position_embeddings"))
    if kind == "default":
        return None
    if kind == "linear":
        return {"kind": "linear", "factor": found["factor"]}
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        return {"kind": "llama3", **{name: found[name] for name in names}, "original_length": length or 8192}
    if kind == "yarn":
        return _yarn(settings, key, found, length)
    settings.refuse(key, kind, "positions are scaled by linear, llama3 or yarn here")
    return None


def _yarn(settings: Settings, key: str, found: Mapping[str, Any], length: int | None) -> dict[str, Any]:
    if found.get("truncate") is False:
        settings.refuse(f"{key}.truncate", found["truncate"], "the first and last blended dims are whole numbers here")
    usual = 0.1 * math.log(found["factor"]) + 1
    if abs((found.get("attention_factor") or usual) - usual) > 1e-6:
        settings.refuse(
            f"{key}.attention_factor", found["attention_factor"], f"it is 0.1 ln(factor) + 1 = {usual:g} here"
        )
    scales = {name: float(found.get(name) or 0.0) for name in ("mscale", "mscale_all_dim")}
    if scales["mscale_all_dim"] and not scales["mscale"]:
        settings.refuse(f"{key}.mscale_all_dim", found["mscale_all_dim"], "it needs an mscale beside it")
    if not all(scales.values()):  # transformers then takes m(1)
        scales = {"mscale": 1.0, "mscale_all_dim": 0.0}
    return {
        "kind": "yarn",
        "factor": found["factor"],
        "original_length": length or settings.need("max_position_embeddings"),
        "beta_fast": found.get("beta_fast") or 32.0,
        "beta_slow": found.get("beta_slow") or 1.0,
        **scales,
    }


def window_key(settings: Settings, first: int | None = None) -> int | None:
    """Return `model.window`.

    Args:
        settings: of the family.
        first: where a family has a window only if asked, the first layer that attends to it; None for one that has it
            in all layers.
    """
    used, width = settings.get("use_sliding_window", first is None), settings.get("sliding_window")
    kinds = settings.get("layer_types", [])
    first = 0 if first is None else settings.get("max_window_layers", first)
    layers = settings.need("num_hidden_layers")
    if not used or width is None or set(kinds) == {"full_attention"}:
        return None
    if set(kinds) == {"sliding_attention"} or (not kinds and not first):
        return int(width)
    if not kinds and first >= layers:
        return None
    key, value = ("layer_types", sorted(set(kinds))) if kinds else ("max_window_layers", first)
    settings.refuse(key, value, f"some of the {layers} layers attend to a window and others do not; here all are alike")
    return None


def common_config(family: Family, model: ModelConfig, vocab: int, eod: int, dtype: str) -> dict[str, Any]:
    """Return config.json of a model, as transformers from 4.45 on read it.

    Args:
        family: of the model.
        model: the network.
        vocab: rows of the embedding that is written.
        eod: the id that ends a document.
        dtype: of the weights that are written.
    """
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": names.get(model.activation, model.activation),
        "max_position_embeddings": model.max_seq_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope.base,
        "rope_scaling": _written_scaling(model),
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "bos_token_id": None,
        "eos_token_id": eod,
        "pad_token_id": None,
        "torch_dtype": dtype,
        **family.write(model),
    }


def _written_scaling(model: ModelConfig) -> dict[str, Any] | None:
    scaling = model.rope.scaling
    if scaling is None:
        return None
    found: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        found["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        found |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        found |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.mscale_all_dim:
            found |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return found
