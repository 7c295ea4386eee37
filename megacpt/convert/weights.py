"""The weights of a checkpoint, one stored tensor at a time, quantised as the model uses them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from megacpt.checkpoint.pieces import Piece, PieceReader
from megacpt.checkpoint.store import find_checkpoint, verify
from megacpt.config import ModelConfig, QuantiseConfig, load_run
from megacpt.continuation.boundary import RUN
from megacpt.continuation.ledger import Ledger
from megacpt.convert.families import LLAMA, Family, Source, Target, check_names
from megacpt.data.tokenizer import Tokenizer, load_tokenizer
from megacpt.errors import CheckpointError
from megacpt.quant.matrix import Quantised, quantise_matrix
from megacpt.runtime.layout import start_process_group

log = logging.getLogger(__name__)
ROUNDED = "round-to-nearest"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Progress = Callable[[int, int], None]


class Weights(ABC):
    """Weights of a network under a family's names, one tensor at a time.

    Args:
        model: the network.
        tokenizer: that it was trained with.
        quantise: the grid that its matrices lie on, if they do.
        name: what the model is called.
        family: names its tensors; None for the names of a Llama.

    Attributes:
        vocab: rows of embedding and head, those that only pad the vocabulary included.
        words: rows without them.

    Raises:
        ConfigError: its tensors have no names in the family.
    """

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: Tokenizer,
        quantise: QuantiseConfig | None,
        name: str,
        family: Family | None = None,
    ) -> None:
        if family is None:
            check_names(model)
        self.family = family or LLAMA
        self.model, self.tokenizer, self.quantise, self.name = model, tokenizer, quantise, name
        self.vocab = model.padded_vocab(tokenizer.vocab_size)
        self.words = model.vocab_size or tokenizer.vocab_size

    def sources(self, padded: bool) -> list[Source]:
        """Return every tensor; with `padded`, embedding and head with the rows that only pad the vocabulary."""
        return list(self.family.sources(self.model, self.vocab, self.vocab if padded else self.words))

    def is_quantised(self, source: Source) -> bool:
        """Whether the model uses a matrix on its grid."""
        return self.quantise is not None and source.kind in self.quantise.parts

    @abstractmethod
    def tensors(
        self, sources: list[Source], progress: Progress | None = None
    ) -> Iterator[tuple[Source, Target, Tensor | Quantised]]:
        """Yield the tensors of the family in order, quantised ones as codes and scales, all others as they are stored.

        Args:
            sources: what to read.
            progress: told after each source: how many are read, and how many there are.
        """


class ModelWeights(Weights):
    """A checkpoint, opened for its weights.

    Args:
        path: a checkpoint, or a run folder for its newest; every hash is looked at.
        choose: gives the family that names its tensors; the names of a Llama, if left out.

    Raises:
        CheckpointError: it is missing or damaged, or its tokenizer is not the one that it was trained with.
        ConfigError: its tensors have no names in the family.
    """

    def __init__(self, path: Path, choose: Callable[[ModelConfig, Ledger], Family] | None = None) -> None:
        start_process_group()
        self.folder = find_checkpoint(path)
        verify(self.folder)
        self.config = load_run(self.folder / RUN)
        self.ledger = Ledger.read(self.folder)
        model, tokenizer = self.config.model, load_tokenizer(self.config.tokenizer)
        family = None if choose is None else choose(model, self.ledger)
        super().__init__(model, tokenizer, grid_of(model, self.ledger), model.name or self.ledger.stage.name, family)
        if tokenizer.fingerprint != self.ledger.tokenizer["fingerprint"]:
            raise CheckpointError(f"{self.config.tokenizer} is not the tokenizer that {self.folder} was trained with")
        self._reader = PieceReader(self.folder)

    @property
    def precision(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return DTYPES[self.config.precision]

    def tensors(
        self, sources: list[Source], progress: Progress | None = None
    ) -> Iterator[tuple[Source, Target, Tensor | Quantised]]:
        """See `Weights.tensors`."""
        for done, source in enumerate(sources, 1):
            if source.targets:
                yield from self._parts(source)
            if progress is not None:
                progress(done, len(sources))

    def _parts(self, source: Source) -> Iterator[tuple[Source, Target, Tensor | Quantised]]:
        stored = self._reader.read(piece_of(source, self.model.layers)).view(source.shape)
        for expert, targets in groupby(source.targets, key=lambda target: target.expert):
            whole = self._matrix(source, stored if expert is None else stored[expert])
            for target in targets:
                yield source, target, take(whole, target.rows.numbers(self.model, source.rows), target.shape[0])
            del whole

    def _matrix(self, source: Source, stored: Tensor) -> Tensor | Quantised:
        if self.quantise is None or not self.is_quantised(source):
            return stored
        if self.model.quantise is None:  # rounded after training: the stored weights are on the grid
            return quantise_matrix(stored, self.quantise, source.split_dim, source.halves)
        # A run in bfloat16 quantises the weights that it computes with, and rounds the matrix. With codes of -1, 0 and
        # 1 that rounds the scales; finer grids leave it to who multiplies.
        found = quantise_matrix(stored.to(self.precision), self.quantise, source.split_dim, source.halves)
        if self.quantise.largest_code > 1:
            return found
        return replace(found, scales=found.scales.to(self.precision).float())


def piece_of(source: Source, layers: int) -> Piece:
    """Return which block of which stored tensor a source is."""
    if source.experts is not None:
        (first, every), (_, *matrix) = source.experts, source.shape
        return Piece(source.name, (first, 0, 0), source.shape, (every, *matrix), torch.float32)
    if source.layer is None:
        return Piece(source.name, (0,) * len(source.shape), source.shape, source.shape, torch.float32)
    offsets = (source.layer, *[0] * len(source.shape))
    return Piece(source.name, offsets, (1, *source.shape), (layers, *source.shape), torch.float32)


def grid_of(model: ModelConfig, ledger: Ledger) -> QuantiseConfig | None:
    """Return the grid that the weights lie on: that of the model, or the one that they were rounded to afterwards."""
    if model.quantise is not None or ledger.derived is None or ledger.derived["operation"] != ROUNDED:
        return model.quantise
    return QuantiseConfig.model_validate(ledger.derived["grid"])


def take(whole: Tensor | Quantised, rows: Tensor | None, count: int) -> Tensor | Quantised:
    """Return the rows of a matrix that a part is.

    Args:
        whole: [o, i], or [o].
        rows: their numbers; None for the first `count`.
        count: how many there are.
    """
    if isinstance(whole, Tensor):
        return whole[:count] if rows is None else whole[rows]
    if rows is None:
        return whole
    blocks = len(whole.scales)
    if blocks == 1:
        return Quantised(whole.codes[rows], whole.scales, whole.transform)
    # A part has rows of whole blocks, and as many of each.
    used = torch.unique_consecutive(rows // (len(whole.codes) // blocks))
    return Quantised(whole.codes[rows], whole.scales[used], whole.transform)


def scale_shape(target: Target, source: Source, config: QuantiseConfig) -> tuple[int, int]:
    """Return how many scales a part of a quantised matrix has, along rows and columns."""
    rows, columns = target.shape
    if config.scale.group is not None:
        return rows, columns // config.scale.group
    shards = config.scale.shards or 1
    return (shards, 1) if source.split_dim == 0 else (1, shards)


def warn_of_activations(weights: Weights) -> None:
    """Say that the programs that read plain weights do not round activations as the model was trained to."""
    if weights.quantise is not None and weights.quantise.activations != "none":
        log.warning(
            "model.quantise.activations is %s: the model was trained with rounded activations, and programs that read "
            "this form multiply them as they are, which gives slightly other outputs",
            weights.quantise.activations,
        )
