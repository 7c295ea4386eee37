"""Where the experts of a model send the tokens of held-out streams, what that measures, and keeping it to compare with.

Definitions are in :mod:`megacpt.evaluate.routing`. A *reference* is what a model chose earlier for the same tokens;
references of a run are kept in one file in its folder.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacpt.data.batches import eval_windows
from megacpt.data.files import write_bytes
from megacpt.data.stream import TokenStream
from megacpt.engine.protocol import Engine
from megacpt.errors import DataError
from megacpt.evaluate import routing
from megacpt.evaluate.dealing import deal, groups

BATCH = 1024  # tokens of a batch of the maximum routing imbalance
FORMAT = 1


@dataclass(frozen=True)
class StreamChoices:
    """Where the first tokens of a stream went.

    Attributes:
        sample: what the tokens were, in words: choices of the same sample compare token by token.
        layers: numbers of the layers with experts, from 1.
        ids: [N], the tokens.
        experts: [layers, N, k] int16, the expert of each choice, -1 where it was dropped.
    """

    sample: str
    layers: tuple[int, ...]
    ids: NDArray[np.int64]
    experts: NDArray[np.int16]


def stream_choices(
    engine: Engine, stream: TokenStream, seq_length: int, max_tokens: int, microbatch: int
) -> StreamChoices | None:
    """Route a stream from its start; every rank calls this and gets the same. None for a model without experts.

    Args:
        engine: holds the model.
        stream: held-out tokens.
        seq_length: tokens the model sees at once.
        max_tokens: tokens to route; fewer where the stream is shorter.
        microbatch: sequences a data-parallel rank takes at a time.
    """
    pieces, tokens = [], []
    layers: tuple[int, ...] = ()
    for group in groups(engine, eval_windows(stream, seq_length, max_tokens), microbatch):
        found = engine.choices(deal(engine, group, microbatch))
        if found is None:
            return None
        valid = np.stack([valid for _, valid in group])
        pieces.append(found.experts[:, : len(group)][:, valid])
        tokens.append(np.stack([ids[:-1] for ids, _ in group])[valid])
        layers = found.layers
    ids = np.concatenate(tokens)
    sample = f"{len(ids)} tokens of {stream.meta.content_hash} in windows of {seq_length}"
    return StreamChoices(sample, layers, ids, np.concatenate(pieces, axis=1))


@dataclass(frozen=True)
class Reference:
    """What a model chose earlier.

    Attributes:
        sample: as of the choices.
        experts: as of the choices.
    """

    sample: str
    experts: NDArray[np.int16]

    def saturation(self, now: StreamChoices) -> list[float] | None:
        """Return the router saturation of each layer since then; None where samples, layers or k are others."""
        if (self.sample, self.experts.shape) != (now.sample, now.experts.shape):
            return None
        return [routing.saturation(*pair) for pair in zip(self.experts, now.experts, strict=True)]


def measures(found: StreamChoices, total: int) -> dict[str, list[float]]:
    """Return what the choices of one stream measure, by name, a number a layer.

    Args:
        found: the choices.
        total: the number of experts of a layer.
    """
    numbers = {
        "max_load": [routing.max_load(layer, total, BATCH) for layer in found.experts],
        "entropy": [routing.load_entropy(layer, total) for layer in found.experts],
        "dropped": [routing.dropped(layer) for layer in found.experts],
        "vocabulary": [routing.vocabulary_specialisation(layer, found.ids, total)[1] for layer in found.experts],
    }
    if found.experts.shape[2] > 1:
        numbers["co_activation"] = [routing.partnership(layer, total) for layer in found.experts]
    return numbers


def by_expert(found: StreamChoices, total: int) -> dict[str, list[list[float]]]:
    """Return the load and the vocabulary specialisation of each expert, [layers, E] each; arguments as `measures`."""
    vocabulary = [routing.vocabulary_specialisation(layer, found.ids, total)[0] for layer in found.experts]
    return {
        "expert_load": [routing.loads(layer, total).tolist() for layer in found.experts],
        "expert_vocabulary": [layer.tolist() for layer in vocabulary],
    }


def stream_information(found: Mapping[str, StreamChoices], total: int) -> dict[str, list[float]]:
    """Return the expert-domain information over streams of equal weight: bits and share, a number a layer each."""
    by_stream = np.array([[routing.loads(layer, total) for layer in one.experts] for one in found.values()])
    pairs = [routing.information(by_stream[:, layer]) for layer in range(by_stream.shape[1])]
    return {"information": [bits for bits, _ in pairs], "information_share": [share for _, share in pairs]}


References = dict[str, dict[str, Reference]]
"""By group (as ``start``), then stream."""


def write_references(path: Path, references: References) -> None:
    """Write references, so that the file is there whole or as it was before.

    Raises:
        OSError: the disk is full or fails.
    """
    every = [(group, stream, one) for group, streams in references.items() for stream, one in streams.items()]
    index = {"format": FORMAT, "entries": [[group, stream, one.sample] for group, stream, one in every]}
    buffer = BytesIO()
    arrays: dict[str, Any] = {f"experts_{number}": one.experts for number, (_, _, one) in enumerate(every)}
    np.savez_compressed(buffer, index=np.array(json.dumps(index)), **arrays)
    write_bytes(path, buffer.getvalue())


def read_references(path: Path) -> References:
    """Read what `write_references` wrote.

    Raises:
        DataError: the file is missing, damaged or of another format.
    """
    found: References = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = json.loads(str(arrays["index"]))
            if index["format"] != FORMAT:
                raise ValueError(f"its format is {index['format']}, not {FORMAT}")
            for number, (group, stream, sample) in enumerate(index["entries"]):
                found.setdefault(group, {})[stream] = Reference(sample, arrays[f"experts_{number}"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as choices of experts to compare with: {error}") from error
    return found
