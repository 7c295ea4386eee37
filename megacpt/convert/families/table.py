"""Families of models as other programs name them: which of our tensors their tensors are parts of.

A family is a table of names with a translation of its settings. One line stands for a tensor of each layer; the rules
of `rows` say which rows of ours theirs are. They are read in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megacpt.convert.families.features import reasons
from megacpt.convert.families.rows import ALL, GATE, Rows
from megacpt.errors import ConfigError

if TYPE_CHECKING:
    from megacpt.config import ModelConfig
    from megacpt.convert.families.settings import Settings

Kind = Literal["attention", "mlp", "experts", "other"]
Size = Callable[["ModelConfig"], int]


@dataclass(frozen=True)
class Target:
    """A tensor of the family.

    Attributes:
        name: as in its files.
        shape: [rows, columns], or [rows].
        rows: which rows of our tensor it is.
        expert: in a block of experts, the place of the one that it belongs to.
    """

    name: str
    shape: tuple[int, ...]
    rows: Rows
    expert: int | None = None


@dataclass(frozen=True)
class Source:
    """A tensor of ours, or a block of one, and those of the family that are its rows.

    Attributes:
        name: in a checkpoint.
        layer: its index along the leading dim of the stored tensor; None for one that is stored by itself.
        shape: without that dim; [experts of the block, rows, columns] for a block of experts.
        kind: which of `model.quantise.parts` it belongs to; ``other`` is never quantised.
        split_dim: the dim that tensor parallelism cuts.
        halves: 2 for a gated first matrix, gate above the second projection.
        targets: in the order in which they are written; empty for a state of ours that the family does not have.
        experts: of a block of experts, the number of the first one, and how many the layer has.
        fill: what our tensor is where the family has nothing to put there.
        exact: it is written in float32, whatever the weights are written in.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    kind: Kind
    split_dim: Literal[0, 1]
    halves: int
    targets: tuple[Target, ...]
    experts: tuple[int, int] | None = None
    fill: float = 0.0
    exact: bool = False

    @property
    def rows(self) -> int:
        """Rows of the tensor, or of each expert's."""
        return self.shape[0] if self.experts is None else self.shape[1]


@dataclass(frozen=True)
class Entry:
    """A line of a family's table, for each layer: our name, and theirs with the rows that each is.

    Attributes:
        ours: behind the layer's prefix, without ``.weight`` or ``.bias``.
        theirs: behind the layer's prefix, likewise; ``{}`` stands for the number of an expert. Empty for a state that
            the family does not have.
        rows: of our tensor.
        kind: see `Source`, as `split_dim`, `fill` and `exact`.
        split_dim: see there.
        columns: width of the matrix; None for a vector.
        biased: whether the model has a bias beside the matrix.
        present: whether a layer has the tensor at all; takes the network, and whether the layer has experts.
        experts: it is a tensor of all experts of a layer.
        bare: the names are whole as they stand.
        fill: see `Source`.
        exact: see `Source`.
    """

    ours: str
    theirs: tuple[tuple[str, Rows], ...]
    rows: Size
    kind: Kind = "other"
    split_dim: Literal[0, 1] = 0
    columns: Size | None = None
    biased: Callable[[ModelConfig], bool] = lambda _: False
    present: Callable[[ModelConfig, bool], bool] = lambda *_: True
    experts: bool = False
    bare: bool = False
    fill: Callable[[ModelConfig], float] = lambda _: 0.0
    exact: bool = False


@dataclass(frozen=True)
class Family:
    """How a family names its tensors and its settings.

    Attributes:
        name: ``model_type`` of its config.json.
        title: what it is called in a sentence, such as "a Llama".
        architecture: the class that loads it.
        layer: prefix of a layer's tensors, with ``{}`` for its number.
        embedding: name of the input embedding.
        norm: name of the last norm.
        head: name of the output projection.
        entries: of a layer.
        read: makes the keys of a `ModelConfig` of config.json.
        write: makes the keys of config.json that `settings.common_config` does not.
        features: what a network may have that a Llama has not; see `features.reasons`.
        refused: further reasons why a network is none of the family.
        stacked: how files may hold what the table has apart: the end of a name, and those of the tensors that it is,
            ``{}`` for the number of an expert. Each expert has them below each other.
        ignored: names (regular expressions) of tensors that are left out, with the reason; takes the network.
    """

    name: str
    title: str
    architecture: str
    layer: str
    embedding: str
    norm: str
    head: str
    entries: tuple[Entry, ...]
    read: Callable[[Settings], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    features: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    refused: Callable[[ModelConfig], Iterator[str]] = lambda _: iter(())
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: Callable[[ModelConfig], Mapping[str, str]] = lambda _: {}

    def reasons(self, model: ModelConfig) -> list[str]:
        """Return why a network is none of this family, a line for each key; empty if it is one."""
        return [*reasons(model, self.title, self.features), *self.refused(model)]

    def check(self, model: ModelConfig) -> None:
        """Refuse a network that is none of this family.

        Raises:
            ConfigError: names every reason.
        """
        if found := self.reasons(model):
            raise ConfigError(f"this model is not {self.title}:\n" + "\n".join(found))

    def sources(self, model: ModelConfig, vocab: int, kept: int) -> Iterator[Source]:
        """Yield every tensor of a model with what becomes of it, embedding first and head last.

        Args:
            model: the network.
            vocab: rows of the embedding and of the head in the checkpoint.
            kept: how many of them are written; those behind only pad the vocabulary.
        """
        stored, written = (vocab, model.hidden), (kept, model.hidden)
        yield _alone("embedding.word_embeddings.weight", f"{self.embedding}.weight", stored, written)
        for layer, moe in enumerate(model.moe_layers):
            for entry in self.entries:
                if entry.present(model, moe):
                    yield from self._layer(model, layer, entry, vocab * model.hidden)
        width = (model.hidden,)
        for word in ("weight", "bias") if model.norm == "layernorm" else ("weight",):
            yield _alone(f"decoder.final_layernorm.{word}", f"{self.norm}.{word}", width, width)
        if not model.tied_embeddings:
            yield _alone("output_layer.weight", f"{self.head}.weight", stored, written)

    def _layer(self, model: ModelConfig, layer: int, entry: Entry, largest: int) -> Iterator[Source]:
        for word in ("weight", "bias") if entry.biased(model) else ("weight",):
            suffix = "" if entry.bare else f".{word}"
            if entry.experts:
                yield from self._experts(model, layer, entry, suffix, largest)
            else:
                yield self._single(model, layer, entry, suffix, word == "bias")

    def _single(self, model: ModelConfig, layer: int, entry: Entry, suffix: str, bias: bool) -> Source:
        total = entry.rows(model)
        beyond = () if entry.columns is None or bias else (entry.columns(model),)
        prefix = self.layer.format(layer)
        targets = tuple(
            Target(f"{prefix}.{name}{suffix}", (rows.count(model, total), *beyond), rows) for name, rows in entry.theirs
        )
        # Layers that are all alike are one stored tensor.
        name, index = (f".{layer}", None) if model.moe is not None else ("", layer)
        kind: Kind = "other" if bias else entry.kind
        return Source(
            f"decoder.layers{name}.{entry.ours}{suffix}",
            index,
            (total, *beyond),
            kind,
            entry.split_dim,
            _halves(entry),
            targets,
            fill=entry.fill(model),
            exact=entry.exact,
        )

    def _experts(self, model: ModelConfig, layer: int, entry: Entry, suffix: str, largest: int) -> Iterator[Source]:
        """Blocks of experts; none is larger than the embedding, unless a single expert is."""
        assert model.moe is not None
        assert entry.columns is not None
        every, total, columns = model.moe.experts, entry.rows(model), entry.columns(model)
        block = max(n for n in range(1, every + 1) if every % n == 0 and (n == 1 or n * total * columns <= largest))
        prefix = self.layer.format(layer)
        parts = [(name, rows, rows.count(model, total)) for name, rows in entry.theirs]
        for first in range(0, every, block):
            targets = tuple(
                Target(f"{prefix}.{name.format(first + n)}{suffix}", (count, columns), rows, n)
                for n in range(block)
                for name, rows, count in parts
            )
            yield Source(
                f"decoder.layers.{layer}.{entry.ours}{suffix}",
                None,
                (block, total, columns),
                entry.kind,
                entry.split_dim,
                _halves(entry),
                targets,
                experts=(first, every),
            )


def _halves(entry: Entry) -> int:
    return 2 if entry.theirs and entry.theirs[0][1] is GATE else 1


def _alone(ours: str, theirs: str, stored: tuple[int, ...], written: tuple[int, ...]) -> Source:
    return Source(ours, None, stored, "other", 0, 1, (Target(theirs, written, ALL),))
