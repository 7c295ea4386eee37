"""The files by which Hugging Face's programs know a tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megacpt.data.tokenizer import BytesTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from megacpt.errors import ConfigError, DataError
from megacpt.runtime.layout import is_first_rank

END = "<|endoftext|>"
# What belongs to a tokenizer and goes wherever it goes. Several of them may hold the same tokenizer.
MODELS = ("tokenizer.json", "tokenizer.model")
_BESIDE = (
    *MODELS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def tokenizer_files(tokenizer: Tokenizer) -> tuple[str | None, dict[str, bytes]]:
    """Return the file that `load_tokenizer` takes (None for ``bytes``), and all files by name.

    The tokenizer of bytes is written as a byte-level BPE without merges, which gives the same ids for every text.
    """
    if isinstance(tokenizer, BytesTokenizer):
        return None, _byte_files()
    source = Path(tokenizer.spec)
    beside = {name: path.read_bytes() for name in _BESIDE if (path := source.parent / name).is_file()}
    if isinstance(tokenizer, SentencePieceTokenizer):
        if "tokenizer_config.json" in beside:
            return "tokenizer.model", {**beside, "tokenizer.model": source.read_bytes()}
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": sentencepiece_model(source).normalizer_spec.add_dummy_prefix,
            "legacy": False,
        }
        return "tokenizer.model", {"tokenizer.model": source.read_bytes(), "tokenizer_config.json": _json(config)}
    return "tokenizer.json", {**beside, "tokenizer.json": source.read_bytes()}


def adopt_tokenizer(folder: Path, out: Path, end: int | list[int] | None) -> Tokenizer:
    """Copy the tokenizer of a model, with its chat template and settings of generation; ranks call this together.

    Args:
        folder: of the model.
        out: a folder of the run.
        end: the id that the model ends texts with, for a tokenizer that does not say it.

    Raises:
        ConfigError: the folder holds no tokenizer that is read here.
        DataError: the tokenizer is damaged.
    """
    if not any((folder / name).is_file() for name in MODELS):
        raise ConfigError(
            f"{folder} holds no tokenizer ({' or '.join(MODELS)}): name the model's with --tokenizer, the path of a "
            "file or folder, or `bytes`"
        )
    if is_first_rank():
        out.mkdir(parents=True, exist_ok=True)
        for name in _BESIDE:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
        _name_end(out, end)
    dist.barrier()
    return load_tokenizer(out)


def _name_end(folder: Path, end: int | list[int] | None) -> None:
    """Let tokenizer_config.json name the token that ends a text, where nothing does."""
    path, file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    generation = folder / "generation_config.json"
    if end is None and generation.is_file():
        end = json.loads(generation.read_bytes()).get("eos_token_id")
    number = end[0] if isinstance(end, list) else end
    if number is None or not file.is_file():
        return
    try:
        load_tokenizer(folder)
    except DataError:
        content = json.loads(file.read_bytes())
        words = {token["id"]: token["content"] for token in content.get("added_tokens", [])}
        words |= {place: word for word, place in content["model"].get("vocab", {}).items()}
        if number in words:
            known = json.loads(path.read_bytes()) if path.is_file() else {}
            path.write_bytes(_json({**known, "eos_token": words[number]}))


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
