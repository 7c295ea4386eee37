"""What a mixture of experts must be like to compute what the dense model it is made of computes.

Up-cycling (Komatsuzaki et al. 2022, arXiv 2212.05055) begins a stage of a model with experts on a dense checkpoint.
Both ways here preserve the function: the first loss of the stage is the one that the dense model would have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megacpt.config.base import Problem
from megacpt.config.model import ModelConfig
from megacpt.config.moe import MoEConfig

Upcycle = Literal["copy", "shared"]
KEY = "stage.carry.upcycle"


def upcycle_problems(before: ModelConfig, after: ModelConfig, how: Upcycle | None) -> Iterator[Problem]:
    """Yield what is wrong with a stage that turns a dense model into one with experts, or the other way about.

    Args:
        before: model of the checkpoint.
        after: model of the stage.
        how: `stage.carry.upcycle`; None where the stage does not ask for it.
    """
    if how is None:
        if before.moe is None and after.moe is not None:
            text = f"the weights were trained without experts: take {KEY}: copy or shared, which makes experts of the "
            yield Problem("model.moe", text + "MLPs, or remove the key")
        elif before.moe is not None and after.moe is None:
            text = "null: the weights were trained with experts, which cannot become one MLP again: remove the key"
            yield Problem("model.moe", text)
    elif before.moe is not None:
        yield Problem(KEY, f"{how}: the checkpoint has experts already: remove the key")
    elif after.moe is None:
        yield Problem(KEY, f"{how}: the stage has no model.moe: give the experts there, or remove the key")
    elif before.quantise != after.quantise:
        text = (
            f"changes beside {KEY}, which keeps what the model computes: let another stage change it, before or after"
        )
        yield Problem("model.quantise", text)
    elif how == "copy":
        yield from _copy_problems(before.ffn, after.expert_ffn, after.moe)
        yield from _part_problems(after)
    elif after.moe.shared_ffn != before.ffn:
        text = f"{after.moe.shared_ffn}: with {KEY}: shared the shared expert starts as the MLP: take {before.ffn}"
        yield Problem("model.moe.shared_ffn", text)


def _part_problems(after: ModelConfig) -> Iterator[Problem]:
    """A copy computes what the MLP does if it is quantised as that one is."""
    parts = [] if after.quantise is None else after.quantise.parts
    if ("mlp" in parts) != ("experts" in parts):
        text = f"{', '.join(parts)}: with {KEY}: copy experts are copies of the MLP: name both or neither"
        yield Problem("model.quantise.parts", text)


def _copy_problems(ffn: int, expert_ffn: int, moe: MoEConfig) -> Iterator[Problem]:
    """Copies whose weights sum to 1 are together what the one MLP was."""
    if expert_ffn != ffn:
        text = f"{expert_ffn}: with {KEY}: copy experts are copies of the MLP: take null, which is model.ffn, {ffn}"
        yield Problem("model.moe.ffn", text)
    if moe.shared_ffn:
        text = f"{moe.shared_ffn}: shared experts would add to what the copies compute: take 0, or {KEY}: shared"
        yield Problem("model.moe.shared_ffn", text)
    if moe.top_k == 1:
        text = "1: the weight of a single expert is below 1, so that its copy would count less than the MLP: take 2, "
        yield Problem("model.moe.top_k", f"{text}or {KEY}: shared")
    elif not moe.renormalise:
        text = "false: the weights of a token's copies must sum to 1, as the one MLP counted: take true"
        yield Problem("model.moe.renormalise", text)
    if moe.scale != 1:
        yield Problem("model.moe.scale", f"{moe.scale:g}: the copies would count {moe.scale:g} times the MLP: take 1")
    if moe.capacity is not None:
        text = f"{moe.capacity:g}: a dropped token would miss its MLP: take null; a later stage may change it"
        yield Problem("model.moe.capacity", text)
