"""What a token costs in a model, and the dense model in which it costs the same: the twin of a mixture of experts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megacpt.config.counts import attention_weights
from megacpt.config.loading import dump
from megacpt.config.model import ModelConfig
from megacpt.errors import ConfigError


@dataclass(frozen=True)
class Cost:
    """FLOPs of the matrix products for a token, forward and backward, and parameters.

    A weight costs 6 FLOPs a token: a product and a sum forward, for the gradient of the input, and for its own. Norms,
    activations, softmax, the lookup in the embedding and what is recomputed are not counted.

    Attributes:
        attention: projections.
        scores: queries times keys and weights times values; a token sees half of its sequence on average, less where
            there is a window.
        feed_forward: MLPs, or the experts that a token uses and the shared one.
        router: logits of the experts.
        output: logits of the vocabulary.
        active: parameters that a token uses.
        parameters: all of them.
    """

    attention: int
    scores: int
    feed_forward: int
    router: int
    output: int
    active: int
    parameters: int

    @property
    def flops(self) -> int:
        """All FLOPs of a token."""
        return self.attention + self.scores + self.feed_forward + self.router + self.output


def cost(model: ModelConfig, seq_length: int, vocab: int | None = None) -> Cost:
    """Count what a token costs.

    Args:
        model: the network.
        seq_length: tokens of a sequence.
        vocab: entries of the tokenizer. Where neither it nor `model.vocab_size` is known, embedding and output are left
            out.
    """
    rows = model.padded_vocab(vocab or 1)
    counted = model.vocab_size is not None or vocab is not None
    left_out = 0 if counted else rows * model.hidden * (1 if model.tied_embeddings else 2)
    return Cost(
        attention=6 * model.layers * attention_weights(model),
        scores=round(6 * model.layers * model.heads * (model.head_dim + model.value_dim) * _seen(model, seq_length)),
        feed_forward=6 * model.hidden * (3 if model.gated else 2) * sum(_widths(model)),
        router=0 if model.moe is None else 6 * model.hidden * model.moe.experts * sum(model.moe_layers),
        output=6 * model.hidden * rows if counted else 0,
        active=model.parameters(vocab or 1, active=True) - left_out,
        parameters=model.parameters(vocab or 1) - left_out,
    )


def _seen(model: ModelConfig, seq_length: int) -> float:
    """Tokens that a token attends to, a mean over those of a sequence."""
    window = min(model.window or seq_length, seq_length)
    return (window * (window + 1) / 2 + (seq_length - window) * window) / seq_length


def _widths(model: ModelConfig) -> list[int]:
    """Inner width that a token uses, layer by layer."""
    moe = model.moe
    used = 0 if moe is None else moe.top_k * model.expert_ffn + moe.shared_ffn
    return [used if experts else model.ffn for experts in model.moe_layers]


@dataclass(frozen=True)
class Twin:
    """A model with experts and its dense twin.

    Attributes:
        experts: the model with experts.
        dense: its twin.
        seq_length: tokens of the sequences in which costs are counted.
        vocab: entries of the tokenizer, as for `cost`.
    """

    experts: ModelConfig
    dense: ModelConfig
    seq_length: int
    vocab: int | None

    @property
    def costs(self) -> tuple[Cost, Cost]:
        """Those of the model with experts, and those of the twin."""
        return cost(self.experts, self.seq_length, self.vocab), cost(self.dense, self.seq_length, self.vocab)

    @property
    def exact_ffn(self) -> float:
        """The inner width with which all layers of the twin would cost exactly the same; it need not be whole."""
        return sum(_widths(self.experts)) / self.experts.layers

    @property
    def miss(self) -> float:
        """The part by which the twin's feed-forward FLOPs are above those of the model; 0 where they are equal."""
        return self.dense.ffn / self.exact_ffn - 1

    def to_dict(self) -> dict[str, Any]:
        """Return the twin and both costs as plain values for JSON."""
        before, after = ({"flops": found.flops, **asdict(found)} for found in self.costs)
        return {
            "model": self.dense.model_dump(mode="json"),
            "seq_length": self.seq_length,
            "vocab_size": self.vocab if self.experts.vocab_size is None else self.experts.vocab_size,
            "exact_ffn": self.exact_ffn,
            "miss": self.miss,
            "costs": {"experts": before, "dense": after},
        }

    def to_yaml(self) -> str:
        """Return the twin as a model file, with both costs side by side in comments."""
        return "\n".join(f"# {line}".rstrip() for line in (*self._title(), *self._table(), *self._notes())) + (
            "\n\n" + dump(self.dense)
        )

    def _title(self) -> list[str]:
        name = self.experts.name or "the model with experts"
        return [f"The dense twin of {name}: a token costs as many FLOPs (matrix products, forward and backward).", ""]

    def _table(self) -> list[str]:
        before, after = self.costs
        rows = [
            ("FLOPs a token", before.flops, after.flops),
            ("  attention, projections", before.attention, after.attention),
            (f"  attention, sequences of {self.seq_length:,}", before.scores, after.scores),
            ("  feed-forward", before.feed_forward, after.feed_forward),
            ("  router", before.router, after.router),
            ("  output", before.output, after.output),
            ("parameters a token uses", before.active, after.active),
            ("parameters", before.parameters, after.parameters),
        ]
        first, second = max(len(row[0]) for row in rows), max(len(f"{max(row[1:]):,}") for row in rows)
        width = max(second, len("with experts"))
        lines = [f"{name:<{first}}  {one:>{width},}  {two:>{width},}" for name, one, two in rows]
        return [f"{'':<{first}}  {'with experts':>{width}}  {'dense twin':>{width}}", *lines]

    def _notes(self) -> list[str]:
        before, _ = self.costs
        notes = ["", f"Not matched: the router, {before.router / before.flops:.2%} of the FLOPs with experts."]
        if self.miss:
            much = f"{abs(self.miss):.2%} {'more' if self.miss > 0 else 'less'}"
            exact = f"{self.exact_ffn:,.2f}".rstrip("0").rstrip(".")
            notes.append(f"ffn: {exact} would match; {self.dense.ffn:,} costs {much} in the feed-forward part.")
        if self.experts.vocab_size is None and self.vocab is None:
            notes.append("Without embedding and output: the size of the vocabulary is not known.")
        return notes


def dense_twin(model: ModelConfig, seq_length: int, vocab: int | None = None, multiple: int = 1) -> Twin:
    """Return the dense model in which a token costs what it costs in a model with experts.

    All but the feed-forward layers is the same. All layers of the twin have one inner width: that with which they cost
    together what experts, shared experts and dense layers do, to the nearest multiple of `multiple`.

    Args:
        model: a model with experts.
        seq_length: tokens of the sequences in which costs are counted.
        vocab: entries of the tokenizer, as for `cost`.
        multiple: what the inner width is a multiple of, such as `parallel.tensor`.

    Raises:
        ConfigError: if the model has no experts.
    """
    if model.moe is None:
        raise ConfigError(f"model.moe: {model.name or 'the model'} has no experts: it is dense already")
    parts = model.layers * multiple
    ffn = multiple * max(1, (2 * sum(_widths(model)) + parts) // (2 * parts))
    name = None if model.name is None else f"{model.name}-dense"
    changed = {**model.model_dump(), "name": name, "ffn": ffn, "moe": None}
    return Twin(model, ModelConfig.model_validate(changed), seq_length, vocab)
