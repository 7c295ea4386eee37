"""A record of single instances: what a model got right, document by document, to compare two checkpoints with.

The record is a file of JSON lines. The first says what was measured, and each other one is an instance: a document of
a stream, or a question of a task.

    {"kind": "header", "format": 1, "checkpoint": "runs/python", "ledger": "51c0…", "streams": {"news": "81cc…"}, …}
    {"kind": "document", "stream": "news", "index": 0, "tokens": 5, "nats": 9.71, "hits": 3, "hit": "b0"}

A token counts once, whatever the layout, the microbatch and the sequence length; only the losses and, where two tokens
are almost equally likely, the hits differ by rounding between layouts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megacpt.data.batches import eval_windows
from megacpt.data.files import disk_full, sync
from megacpt.data.indexed import IndexedTokens
from megacpt.data.stream import TokenStream
from megacpt.engine.protocol import Engine
from megacpt.errors import DataError, SetupError
from megacpt.evaluate.dealing import deal, groups
from megacpt.evaluate.loss import StreamLoss

FORMAT = 1
_DOCUMENTS = 1 << 16  # whose ends are worked out at once


@dataclass(frozen=True)
class Instance:
    """One document of a stream, or one question of a task.

    Attributes:
        stream: name of the stream or the task.
        index: number of the document in its stream, from 0.
        nats: summed loss of its predictions; None where there is none (tasks).
        hit: [tokens] bool, for each prediction whether it was right: for a token, whether it was the likeliest.
    """

    stream: str
    index: int
    nats: float | None
    hit: NDArray[np.bool_]

    @property
    def tokens(self) -> int:
        """Predictions; tokens of a document, 1 for a question."""
        return len(self.hit)

    def to_json(self) -> str:
        """One line; the hits are bits, 8 predictions to two hex digits, the first prediction the highest bit."""
        content = {
            "kind": "question" if self.nats is None else "document",
            "stream": self.stream,
            "index": self.index,
            "tokens": self.tokens,
            "nats": None if self.nats is None else round(self.nats, 6),
            "hits": int(self.hit.sum()),
            "hit": np.packbits(self.hit).tobytes().hex(),
        }
        return json.dumps(content, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Instance:
        """Read a line; raise ValueError, KeyError or TypeError where it is not one."""
        content = json.loads(line)
        tokens, nats = int(content["tokens"]), content["nats"]
        packed = np.frombuffer(bytes.fromhex(content["hit"]), dtype=np.uint8)
        if len(packed) != -(-tokens // 8):
            raise ValueError(f"{tokens} tokens do not fit the hits")
        hit = np.unpackbits(packed, count=tokens).astype(np.bool_)
        if int(hit.sum()) != content["hits"]:
            raise ValueError("the number of hits is not that of their bits")
        return cls(str(content["stream"]), int(content["index"]), None if nats is None else float(nats), hit)


@dataclass(frozen=True)
class Header:
    """What a record is about.

    Attributes:
        checkpoint: as it was named.
        ledger: id of the checkpoint's ledger.
        tokenizer: fingerprint.
        streams: content hash by name; of tasks their version.
    """

    checkpoint: str
    ledger: str
    tokenizer: str
    streams: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The first line."""
        return json.dumps({"kind": "header", "format": FORMAT, **vars(self)}, ensure_ascii=False)


def measure_documents(
    engine: Engine, name: str, stream: TokenStream, seq_length: int, max_tokens: int | None, microbatch: int
) -> Iterator[Instance]:
    """Measure a stream from its start and yield its documents; every rank calls this and gets the same.

    Documents without a token, and a last one that `max_tokens` cuts off before its first token, are left out. The first
    token of a stream has nothing to be predicted from, and does not count.

    Args:
        engine: holds the model.
        name: how the stream is called.
        stream: held-out tokens.
        seq_length: tokens the model sees at once.
        max_tokens: predictions to measure; None for the whole stream.
        microbatch: sequences a data-parallel rank takes at a time.
    """
    rows = _outcomes(engine, stream, seq_length, max_tokens, microbatch)
    nats, hit = np.empty(0, np.float64), np.empty(0, np.bool_)
    begin = 1
    for index, end in enumerate(_document_ends(stream.indexed)):
        pieces, held = [(nats, hit)], len(nats)
        while begin + held < end and (row := next(rows, None)) is not None:
            pieces.append(row)
            held += len(row[0])
        nats, hit = (np.concatenate(part) for part in zip(*pieces, strict=True))
        count = min(max(end - begin, 0), held)
        if count:
            yield Instance(name, index, float(nats[:count].sum()), hit[:count])
        elif begin < end:
            return  # all predictions have been given out
        nats, hit, begin = nats[count:], hit[count:], begin + count


def documents_and_loss(
    engine: Engine,
    name: str,
    stream: TokenStream,
    seq_length: int,
    max_tokens: int | None,
    microbatch: int,
    write: Callable[[Instance], object],
) -> StreamLoss:
    """Measure a stream as `loss.evaluate_stream` does, giving each document to `write`; arguments as for both."""
    nats, tokens = 0.0, 0
    for instance in measure_documents(engine, name, stream, seq_length, max_tokens, microbatch):
        write(instance)
        nats, tokens = nats + (instance.nats or 0.0), tokens + instance.tokens
    return StreamLoss.of(name, stream, nats, tokens)


def _outcomes(
    engine: Engine, stream: TokenStream, seq_length: int, max_tokens: int | None, microbatch: int
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Loss and hit of each prediction, a window at a time."""
    for group in groups(engine, eval_windows(stream, seq_length, max_tokens), microbatch):
        found = engine.predict(deal(engine, group, microbatch))
        for (_, valid), nats, hits in zip(group, found.nats, found.hits, strict=False):
            yield nats[valid].astype(np.float64), hits[valid]


def _document_ends(indexed: IndexedTokens) -> Iterator[int]:
    """The position behind the last token of each document, in order."""
    begin = 0
    for at in range(0, indexed.documents, _DOCUMENTS):
        sequences = indexed.boundaries[at : at + _DOCUMENTS + 1]
        lengths = indexed.sequence_lengths[int(sequences[0]) : int(sequences[-1])]
        ends = begin + np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        yield from ends[sequences[1:] - sequences[0]].tolist()
        begin = int(ends[-1])


def read_record(path: Path) -> tuple[Header, Iterator[Instance]]:
    """Open a record; its instances are read as they are asked for.

    Raises:
        DataError: the file is missing or is no such record, or, while it is read, a line is damaged.
    """
    lines = _lines(path)
    try:
        content = json.loads(next(lines, ""))
        if content.pop("kind") != "header" or content.pop("format") != FORMAT:
            raise ValueError
        header = Header(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not an instance record of format {FORMAT}: write one with `megacpt eval CHECKPOINT --stream "
            f"STREAM --instances {path}`"
        ) from error
    return header, _instances(path, lines)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise DataError(f"the instance record {path} cannot be read: {why}") from error


def _instances(path: Path, lines: Iterator[str]) -> Iterator[Instance]:
    for number, line in enumerate(lines, 2):
        try:
            yield Instance.from_json(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}, line {number}, is not an instance ({error}): write the record again") from error


@contextmanager
def record_writer(path: Path, header: Header) -> Iterator[Callable[[Instance], None]]:
    """A function that adds an instance to a new record; the file is there, whole, once the context is left.

    Raises:
        SetupError: the disk is full or fails.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(header.to_json() + "\n")
            yield lambda instance: print(instance.to_json(), file=file)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise SetupError(f"{path} cannot be written: {disk_full(error) or error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
