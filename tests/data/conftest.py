"""Streams made from texts, and small tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from megacpt.data.indexed import IndexedWriter
from megacpt.data.prepare import prepare
from megacpt.data.stream import StreamMeta, TokenStream
from megacpt.data.train_tokenizer import train_tokenizer

# The same examples every time, and no limit on the time of one: the machine may be busy.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

MakeStream = Callable[..., TokenStream]
TEXT = "The quick brown fox jumps over the lazy dog.\n\tAnd 12345 more: naïve café, 漢字, 😀  two  spaces.\n"


@pytest.fixture
def make_stream(tmp_path: Path) -> MakeStream:
    """Return a function that prepares a byte stream of the given texts under tmp_path."""

    def make(texts: Sequence[str], name: str = "stream", tokenizer: str = "bytes") -> TokenStream:
        source = tmp_path / f"{name}.jsonl"
        write_jsonl(source, texts)
        prepare([source], tokenizer, tmp_path / name, workers=1, progress=False)
        return TokenStream.open(tmp_path / name)

    return make


def write_jsonl(path: Path, texts: Sequence[str], field: str = "text") -> None:
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small SentencePiece tokenizer.model."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text(TEXT * 20)
    train_tokenizer([folder / "text.txt"], 340, folder / "tokenizer")
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Hugging Face tokenizer.json that asks for truncation and padding."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<|endoftext|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 20, trainer)
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    folder = tmp_path_factory.mktemp("hf")
    backend.save(str(folder / "tokenizer.json"))
    return folder


def write_stream(folder: Path, lengths: Sequence[int], scores: Sequence[float] | None = None) -> TokenStream:
    """Write a stream of documents of these lengths (of ids 0, 1, 2, ...), with these scores."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.arange(sum(lengths)) % 2**16
    with IndexedWriter(folder / folder.name, np.dtype(np.uint16), scores is not None) as writer:
        for end, length, score in zip(accumulate(lengths), lengths, scores or [None] * len(lengths), strict=True):
            writer.add(ids[end - length : end], score)
        content = writer.finish()
    counts = (len(lengths), sum(lengths), sum(lengths))
    StreamMeta(folder.name, folder.name, "bytes", "0" * 64, 257, 256, *counts, "uint16", content, [], {}).write(folder)
    return TokenStream.open(folder)
