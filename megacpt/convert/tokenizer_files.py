"""The files by which Hugging Face's programs know a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megacpt.data.tokenizer import BytesTokenizer, SentencePieceTokenizer, Tokenizer

END = "<|endoftext|>"
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json")


def tokenizer_files(tokenizer: Tokenizer) -> tuple[str | None, dict[str, bytes]]:
    """Return the file that `load_tokenizer` takes (None for ``bytes``), and all files by name.

    The tokenizer of bytes is written as a byte-level BPE without merges, which gives the same ids for every text.
    """
    if isinstance(tokenizer, BytesTokenizer):
        return None, _byte_files()
    source = Path(tokenizer.spec)
    if isinstance(tokenizer, SentencePieceTokenizer):
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": sentencepiece_model(source).normalizer_spec.add_dummy_prefix,
            "legacy": False,
        }
        return "tokenizer.model", {"tokenizer.model": source.read_bytes(), "tokenizer_config.json": _json(config)}
    found = {"tokenizer.json": source.read_bytes()}
    found.update({name: path.read_bytes() for name in _BESIDE if (path := source.parent / name).is_file()})
    return "tokenizer.json", found


def sentencepiece_model(file: Path) -> Any:
    """Read a SentencePiece model as the message it is: pieces, normalizer_spec, trainer_spec."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file.read_bytes())
    return model


def byte_characters() -> list[str]:
    """Return the characters that stand for the bytes 0 to 255 in byte-level BPE (GPT-2, Radford et al. 2019).

    Printable ones of Latin-1 stand for themselves, the others take characters from U+0100 on in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _byte_files() -> dict[str, bytes]:
    end = {"id": 256, "content": END, "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    by_byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model: dict[str, object] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {**{word: byte for byte, word in enumerate(byte_characters())}, END: 256},
        "merges": [],
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, **flags}],
        "normalizer": None,
        "pre_tokenizer": by_byte,
        "post_processor": None,
        "decoder": by_byte,
        "model": model,
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": _json(content), "tokenizer_config.json": _json(config)}


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
