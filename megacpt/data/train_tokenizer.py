"""Training a SentencePiece tokenizer from the same inputs as `prepare`."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megacpt.data.files import disk_full, write_bytes
from megacpt.data.inputs import find_files
from megacpt.data.readers import read_documents
from megacpt.data.tokenizer import SentencePieceTokenizer
from megacpt.errors import DataError

MODEL_FILE = "tokenizer.model"
# SentencePiece drops longer sentences without a word, so that texts are cut before it sees them.
_CHUNK_CHARACTERS = 2000
_CHUNK_BYTES = 4 * _CHUNK_CHARACTERS
_SAMPLED_CHUNKS = 2_000_000


def train_tokenizer(
    inputs: Sequence[str | Path], vocab_size: int, out: str | Path, field: str = "text"
) -> SentencePieceTokenizer:
    """Train a byte-pair model of `vocab_size` pieces into ``OUT/tokenizer.model``, and return the tokenizer.

    Text is taken as it is: no normalisation, all spaces and line ends kept, digits apart, and characters
    without a piece spelled in bytes, so that decoding gives back what was encoded. (One exception is
    SentencePiece's own: it writes spaces as U+2581, and gives that character back as a space.) Of a large
    input, two million stretches of up to 2,000 characters are drawn.

    Raises DataError for bad input, for an `out` that has a tokenizer, and for a size that the text cannot
    fill.
    """
    target = Path(out) / MODEL_FILE
    if target.exists():
        raise DataError(f"{target} exists: choose another --out, or remove it")
    pieces = [piece for found in find_files(inputs) for piece in found]
    chunks = (chunk for piece in pieces for document in read_documents(piece, field) for chunk in _cut(document.text))
    try:
        model = _train(chunks, vocab_size)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, model)
    except OSError as error:
        raise DataError(f"{target} cannot be written: {disk_full(error) or error.strerror}") from error
    return SentencePieceTokenizer(target)


def _cut(text: str) -> Iterator[str]:
    for at in range(0, len(text), _CHUNK_CHARACTERS):
        yield text[at : at + _CHUNK_CHARACTERS]


def _train(chunks: Iterator[str], vocab_size: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=chunks,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            split_digits=True,
            max_sentence_length=_CHUNK_BYTES,
            input_sentence_size=_SAMPLED_CHUNKS,
            shuffle_input_sentence=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_explain(str(error), vocab_size)) from error
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    if largest := re.search(r"value <= (\d+)", message):
        return f"--vocab-size {vocab_size} is more than this text can fill ({largest[1]}): give more text"
    if smallest := re.search(r"(\d+) vs (\d+)", message):
        return f"--vocab-size {vocab_size} is too small: bytes, marks and characters alone need {smallest[2]}"
    return f"SentencePiece could not train on this input: {message}"
