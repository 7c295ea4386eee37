"""Generation with a ternary model: packed beside dense in the same decoder, and beside another program."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megacpt.bench.result import Series
from megacpt.config import ModelConfig
from megacpt.convert.families import LLAMA
from megacpt.quant.matrix import Quantised
from megacpt.serve.decoder import Decoder

INT8, FLOAT, DENSE, DENSE_TORCH = "packed, int8", "packed, float", "dense float32", "dense float32, torch"
PREFILL, DECODE = "prefill", "decode"
# The 99M model of Spectra (Kaushal et al. 2024, arXiv 2407.12327, table 3), with a smaller vocabulary.
SPECTRA_99M: dict[str, Any] = {
    "name": "Spectra 99M, vocabulary of 32k",
    "layers": 16,
    "hidden": 512,
    "ffn": 1280,
    "heads": 8,
    "vocab_size": 32000,
    "max_seq_length": 2048,
}


class RandomTernary:
    """A ternary model of random codes and embeddings, as a source for `Decoder`.

    Args:
        model: its sizes.
        dense: give the same matrices, embedding and head in float32; else these two are float16, as llama.cpp has them.
    """

    def __init__(self, model: ModelConfig, dense: bool = False) -> None:
        self.model, self._dense = model, dense
        vocab = model.padded_vocab()
        targets = [(source.kind, target) for source in LLAMA.sources(model, vocab, vocab) for target in source.targets]
        self._shapes = {target.name: target.shape for _, target in targets}
        self._kinds = {target.name: kind for kind, target in targets}
        self._seeds = {name: seed for seed, name in enumerate(self._shapes)}

    def names(self) -> Iterable[str]:
        """The names of all matrices and vectors."""
        return self._shapes

    def is_quantised(self, name: str) -> bool:
        """Whether a matrix has codes and scales."""
        return not self._dense and self._kinds[name] != "other"

    def tensor(self, name: str) -> Tensor:
        """One without codes: the weights of norms are ones, embedding and head are random."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape)
        if self._kinds[name] != "other":
            return self.quantised(name).dense()
        # Embeddings as large as what layers add, so that the tokens read so far decide on the next.
        size = 1.0 if name.startswith(LLAMA.embedding) else shape[1] ** -0.5
        half = (size * torch.randn(shape, generator=self._draw(name))).half()
        return half.float() if self._dense else half

    def quantised(self, name: str) -> Quantised:
        """One with codes and a scale, which is a number of float16."""
        o, i = self._shapes[name]
        codes = torch.randint(-1, 2, (o, i), dtype=torch.int8, generator=self._draw(name))
        return Quantised(codes, torch.full((1, 1), i**-0.5).half().float())

    def _draw(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(self._seeds[name])


class Side(Protocol):
    """A model that reads a prompt, and then one token after the other, each the likeliest after those before."""

    def run(self, prompt: list[int], count: int) -> tuple[float, float, list[int]]:
        """The seconds that the prompt took, those of `count` tokens after it, and these tokens."""


class DecoderSide:
    """One of ours.

    Args:
        decoder: the model.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def run(self, prompt: list[int], count: int) -> tuple[float, float, list[int]]:
        """See `Side`."""
        start = time.perf_counter()
        cache = self.decoder.cache(len(prompt) + count)
        found = [int(self.decoder.feed(prompt, cache).argmax())]
        read = time.perf_counter()
        while len(found) <= count:
            found.append(int(self.decoder.feed(found[-1:], cache).argmax()))
        return read - start, time.perf_counter() - read, found[:-1]


def our_sides(model: ModelConfig) -> dict[str, Side]:
    """The decoders of random weights that are measured beside each other."""
    return {
        INT8: DecoderSide(Decoder(RandomTernary(model), "int8")),
        FLOAT: DecoderSide(Decoder(RandomTernary(model), "float")),
        DENSE: DecoderSide(Decoder(RandomTernary(model, dense=True))),
        DENSE_TORCH: DecoderSide(Decoder(RandomTernary(model, dense=True), native=False)),
    }


def time_decoding(
    sides: Mapping[str, Side], prompt: int, count: int, blocks: int, heard: Callable[[], None]
) -> tuple[dict[str, Series], dict[str, list[int]]]:
    """Time prompts and decoding of all sides, in turns.

    Args:
        sides: the models by name.
        prompt: tokens of the prompt.
        count: tokens decoded.
        blocks: times of each side, after a first one that does not count.
        heard: is called after each turn of all sides.

    Returns:
        The times, named ``decode: SIDE`` and ``prefill: SIDE``, and the tokens that each side chose.
    """
    ids = [int(token) for token in torch.randint(0, 256, (prompt,), generator=torch.Generator().manual_seed(0))]
    tokens = {name: side.run(ids, count)[2] for name, side in sides.items()}
    times: dict[str, list[list[float]]] = {f"{part}: {name}": [] for part in (DECODE, PREFILL) for name in sides}
    for done in range(blocks):
        for name in list(sides)[:: 1 if done % 2 else -1]:
            read, decoded, _ = sides[name].run(ids, count)
            times[f"{PREFILL}: {name}"].append([read])
            times[f"{DECODE}: {name}"].append([decoded])
        heard()
    work = {PREFILL: prompt, DECODE: count}
    found = {
        name: Series(blocks=seconds, work=float(work[name.partition(":")[0]]), unit="token")
        for name, seconds in times.items()
    }
    return found, tokens
