"""Which rows of one of our tensors a tensor of a family is, and back.

Megatron fuses queries, keys and values, group by group, and the gate with the second projection; other programs keep
them as matrices of their own. A rule gives the rows of our tensor by number, in the order of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megacpt.config import ModelConfig


@dataclass(frozen=True)
class Rows:
    """A rule.

    Attributes:
        name: for people.
        numbers: takes the network and the rows of our tensor; returns which of them the other one is, [its rows] int64
            in its order, or None for the first ones (all, or all but those that pad).
    """

    name: str
    numbers: Callable[[ModelConfig, int], Tensor | None]

    def count(self, model: ModelConfig, total: int) -> int:
        """How many of the `total` rows of our tensor the other one has."""
        numbers = self.numbers(model, total)
        return total if numbers is None else len(numbers)


def _fused(model: ModelConfig) -> Tensor:
    """Rows of the fused matrix of attention, [groups, heads of a group with its key and value, head_dim] int64.

    It has, for each group of heads that share keys and values, the rows of its query heads, then its key head's, then
    its value head's.
    """
    shared = model.heads // model.kv_heads
    rows = torch.arange((model.heads + 2 * model.kv_heads) * model.head_dim)
    return rows.view(model.kv_heads, shared + 2, model.head_dim)


ALL = Rows("all", lambda *_: None)
QUERY = Rows("query", lambda model, _: _fused(model)[:, :-2].reshape(-1))
KEY = Rows("key", lambda model, _: _fused(model)[:, -2].reshape(-1))
VALUE = Rows("value", lambda model, _: _fused(model)[:, -1].reshape(-1))
GATE = Rows("gate", lambda _, total: torch.arange(total // 2))
UP = Rows("up", lambda _, total: torch.arange(total // 2, total))


def put(whole: Tensor, numbers: Tensor | None, first: int, block: Tensor) -> None:
    """Write rows of theirs to their places in ours.

    Args:
        whole: our tensor, [rows, ..].
        numbers: of the rule.
        first: which of their rows `block` begins with.
        block: [rows of it, ..], of any dtype.
    """
    if numbers is None:
        whole[first : first + len(block)] = block
    else:
        whole[numbers[first : first + len(block)]] = block.to(whole.dtype)
