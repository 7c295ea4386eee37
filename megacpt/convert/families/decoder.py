"""Lines that the tables of Llama's descendants share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megacpt.convert.families.rows import ALL, GATE, KEY, QUERY, UP, VALUE
from megacpt.convert.families.table import Entry

if TYPE_CHECKING:
    from megacpt.config import ModelConfig


def hidden(model: ModelConfig) -> int:
    """Width of the residual stream."""
    return model.hidden


def head_norm(model: ModelConfig) -> int:
    """Width of a norm on the queries or keys of one head."""
    return model.head_dim


def always(_: ModelConfig) -> bool:
    """Every model has it."""
    return True


def dense(_: ModelConfig, moe: bool) -> bool:
    """The layer has an MLP."""
    return not moe


def with_experts(_: ModelConfig, moe: bool) -> bool:
    """The layer has experts."""
    return moe


def has_shared(model: ModelConfig, moe: bool) -> bool:
    """The layer has shared experts."""
    return moe and model.moe is not None and model.moe.shared_ffn > 0


def all_biases(model: ModelConfig) -> bool:
    """All linear layers have biases."""
    return model.bias


def qkv_biases(model: ModelConfig) -> bool:
    """Queries, keys and values have biases."""
    return model.bias or model.qkv_bias


def qk_norm(model: ModelConfig, _: bool) -> bool:
    """Queries and keys are normalised."""
    return bool(model.qk_norm)


def norm(ours: str, theirs: str, biased: Callable[[ModelConfig], bool] = lambda _: False) -> Entry:
    """A norm on the residual stream."""
    return Entry(ours, ((theirs, ALL),), hidden, biased=biased)


INPUT_NORM = norm("input_layernorm", "input_layernorm")
MLP_NORM = norm("pre_mlp_layernorm", "post_attention_layernorm")
QUERY_KEY_VALUE = Entry(
    "self_attention.linear_qkv",
    (("self_attn.q_proj", QUERY), ("self_attn.k_proj", KEY), ("self_attn.v_proj", VALUE)),
    lambda model: (model.heads + 2 * model.kv_heads) * model.head_dim,
    "attention",
    columns=hidden,
    biased=qkv_biases,
)
HEAD_NORMS = tuple(
    Entry(f"self_attention.{word}_layernorm", ((f"self_attn.{word}_norm", ALL),), head_norm, present=qk_norm)
    for word in ("q", "k")
)
ATTENTION_OUTPUT = Entry(
    "self_attention.linear_proj",
    (("self_attn.o_proj", ALL),),
    hidden,
    "attention",
    split_dim=1,
    columns=lambda model: model.heads * model.head_dim,
    biased=all_biases,
)
MLP = (
    Entry(
        "mlp.linear_fc1",
        (("mlp.gate_proj", GATE), ("mlp.up_proj", UP)),
        lambda model: 2 * model.ffn,
        "mlp",
        columns=hidden,
        biased=all_biases,
        present=dense,
    ),
    Entry(
        "mlp.linear_fc2",
        (("mlp.down_proj", ALL),),
        hidden,
        "mlp",
        split_dim=1,
        columns=lambda model: model.ffn,
        biased=all_biases,
        present=dense,
    ),
)


def stacked(prefix: str, gate: str, up: str, down: str) -> dict[str, tuple[str, ...]]:
    """Return how transformers 5 keeps experts, and writes them if asked; arguments as `experts`."""
    return {
        "mlp.experts.gate_up_proj": (f"{prefix}.{gate}.weight", f"{prefix}.{up}.weight"),
        "mlp.experts.down_proj": (f"{prefix}.{down}.weight",),
    }


def experts_of(model: ModelConfig) -> int:
    """Experts of a layer."""
    return 0 if model.moe is None else model.moe.experts


def even_share(model: ModelConfig) -> float:
    """What an expert has of all choices where nothing is known of them."""
    return 1 / experts_of(model)


def experts(
    prefix: str, gate: str, up: str, down: str, router: str, choice_bias: str | None = None
) -> tuple[Entry, ...]:
    """The lines of a layer of experts.

    Args:
        prefix: of an expert's matrices, with ``{}`` for its number.
        gate: its matrices, behind the prefix.
        up: likewise.
        down: likewise.
        router: name of the router's matrix.
        choice_bias: whole name of the bias on the choice; None where the family has none.
    """
    bias = () if choice_bias is None else ((choice_bias, ALL),)
    return (
        Entry("mlp.router", ((router, ALL),), experts_of, columns=hidden, present=with_experts),
        Entry("mlp.router.choice_bias", bias, experts_of, present=with_experts, bare=True, exact=True),
        Entry("mlp.router.log_u", (), experts_of, present=with_experts, bare=True),
        Entry("mlp.router.shares", (), experts_of, present=with_experts, bare=True, fill=even_share),
        Entry(
            "mlp.experts.linear_fc1",
            ((f"{prefix}.{gate}", GATE), (f"{prefix}.{up}", UP)),
            lambda model: 2 * model.expert_ffn,
            "experts",
            columns=hidden,
            present=with_experts,
            experts=True,
        ),
        Entry(
            "mlp.experts.linear_fc2",
            ((f"{prefix}.{down}", ALL),),
            hidden,
            "experts",
            split_dim=1,
            columns=lambda model: model.expert_ffn,
            present=with_experts,
            experts=True,
        ),
    )
