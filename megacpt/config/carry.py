"""What a stage does with the state of the checkpoint that it continues, and what it leaves as it is."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from megacpt.config.base import Number, Section
from megacpt.config.upcycle import Upcycle
from megacpt.errors import nearest

PARTS = ("embeddings", "output", "norms", "attention", "mlp", "router", "experts")
_LAYERS = re.compile(r"layers:(\d+)(?:-(\d+))?")


class CarryConfig(Section):
    """How much of the optimizer's moments goes on into a stage (1 keeps, 0 resets), and what becomes of the MLPs."""

    first_moment: Number = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Weight of the parent's running mean of the gradient at the start of the stage: 1 keeps it, 0 "
        "begins anew, 0.5 lets what was gathered count half against what comes. The correction of the mean for its "
        "young age follows.",
        examples=[1.0, 0],
    )
    second_moment: Number = Field(
        default=1.0,
        ge=0,
        le=1,
        description="The same for the running mean of the squared gradient, which sets the size of the steps. Where it "
        "begins anew and the first moment does not, it begins with the square of that one. Lion has none.",
        examples=[1.0, 0.1],
    )
    upcycle: Upcycle | None = Field(
        default=None,
        description="How the MLPs of a dense checkpoint become the experts that the stage gives in `model.moe` "
        "(Komatsuzaki et al. 2022). copy: every expert starts as a copy of the MLP. shared: the shared expert starts "
        "as the MLP, the others start with adding nothing. Both begin with the very function of the dense model. null: "
        "not at all.",
        examples=["copy", "shared"],
    )


def _frozen(value: Any) -> Any:
    if not isinstance(value, str) or value in PARTS:
        return value
    match = _LAYERS.fullmatch(value)
    if match is None:
        raise ValueError(f"'{value}' is no part of the model: take {', '.join(PARTS)} or layers:1-4{_hint(value)}")
    first, last = layer_range(value)
    if not 1 <= first <= last:
        raise ValueError(f"'{value}' is no range of layers: they are counted from 1, the first one at the input")
    return value


def _hint(value: str) -> str:
    return nearest(value, PARTS)


def layer_range(part: str) -> tuple[int, int]:
    """Return the first and the last layer of ``layers:2`` or ``layers:1-4``; (0, 0) for a part that is no range."""
    match = _LAYERS.fullmatch(part)
    if match is None:
        return 0, 0
    return int(match[1]), int(match[2] or match[1])


FrozenPart = Annotated[str, BeforeValidator(_frozen)]
"""A part of the model, or a range of its layers."""
