"""What a family can compute: the choices of a network that it has, and in words those that it has not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megacpt.config import ModelConfig

# What a plain Llama-like decoder has: for each choice the values that it may take. A window, experts and latent
# attention are there or not; a scaling of positions goes by its kind.
PLAIN: Mapping[str, tuple[object, ...]] = {
    "activation": ("swiglu",),
    "norm": ("rmsnorm",),
    "norm_place": ("input",),
    "parallel_residual": (False,),
    "sub_norm": (False,),
    "window": (False,),
    "latent": (False,),
    "qk_norm": (False,),
    "qkv_bias": (False,),
    "bias": (False,),
    "rope.share": (1.0,),
    "rope.scaling": (None, "linear", "llama3", "yarn"),
    "moe": (False,),
    "moe.balance": ("penalty", "sinkhorn", "none"),
    "moe.capacity": (False,),
}
ANY = object()  # any value
_WORDS: Mapping[str, str] = {
    "qk_norm": "{title} does not normalise queries and keys",
    "moe": "{title} has no experts",
    "latent": "{title} has no latent attention",
    "window": "{title} attends to all tokens before, not to a window",
    "parallel_residual": "in {title} attention and MLP come one after the other",
    "sub_norm": "{title} does not normalise what the last projections multiply",
    "bias": "{title} has no biases",
    "qkv_bias": "{title} has no biases on queries, keys and values",
    "rope.share": "{title} rotates all dimensions of a head, not {value:g} of them",
    "moe.balance": "{title} has no bias on the choice of experts",
    "moe.capacity": "in {title} experts take all tokens that choose them",
}


def reasons(model: ModelConfig, title: str, features: Mapping[str, tuple[object, ...]]) -> Iterator[str]:
    """Yield a line for every choice of a network that a family does not have.

    Args:
        model: the network.
        title: of the family.
        features: the values of choices that are not as in `PLAIN`.
    """
    for key, plain in PLAIN.items():
        allowed = features.get(key, plain)
        value = _value(model, key)
        if value in allowed or ANY in allowed or (key.startswith("moe.") and model.moe is None):
            continue
        if allowed == plain and key in _WORDS:
            yield f"model.{key}: {_WORDS[key].format(title=title, value=value)}"
        else:
            yield f"model.{key}: {_shown(value)}, and {title} has {' or '.join(map(_shown, allowed))}"
    scaling = model.rope.scaling
    if scaling is not None and scaling.kind == "yarn" and scaling.mscale != 1 and not scaling.mscale_all_dim:
        yield f"model.rope.scaling.mscale: {scaling.mscale:g}, and {title} takes it only beside an mscale_all_dim"


def _value(model: ModelConfig, key: str) -> object:
    """The choice as `PLAIN` spells it."""
    moe, scaling = model.moe, model.rope.scaling
    special: dict[str, object] = {
        "window": model.window is not None,
        "latent": model.latent is not None,
        "moe": moe is not None,
        "moe.balance": None if moe is None else moe.balance.kind,
        "moe.capacity": moe is not None and moe.capacity is not None,
        "rope.share": model.rope.share,
        "rope.scaling": None if scaling is None else scaling.kind,
    }
    return special[key] if key in special else getattr(model, key)


def _shown(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def unequal_heads(model: ModelConfig, title: str) -> Iterator[str]:
    """Yield why the heads of a network are not those of a family in which they make up the residual stream."""
    if model.heads * model.head_dim != model.hidden:
        text = f"{model.head_dim}, and the {model.heads} heads of {title} are as wide as model.hidden, {model.hidden}"
        yield f"model.head_dim: {text}"
