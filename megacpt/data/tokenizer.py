"""From text to token ids and back: raw bytes, SentencePiece, and Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.errors import DataError, SetupError

BYTES = "bytes"
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>")


class Tokenizer(ABC):
    """Text to ids and back, with an end-of-document id and an identity.

    `spec` is what `load_tokenizer` takes to make it again, `vocab_size` one more than the largest id, `eod`
    the id that ends a document, and `fingerprint` a SHA-256 that two tokenizers share only when they give the
    same ids.
    """

    spec: str
    vocab_size: int
    eod: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text` as int32 [n], without any mark of beginning or end.

        The spelling of a special token inside `text` is text: it never becomes the special token.
        """
        return self._encode(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`, without end-of-document ids; bytes that are no UTF-8 become U+FFFD."""
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if outside.size:
            raise DataError(
                f"id {outside[0]} is outside the vocabulary of tokenizer {self.spec} (0 to {self.vocab_size - 1})"
            )
        return self._decode(array[array != self.eod])

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray: ...

    @abstractmethod
    def _decode(self, ids: np.ndarray) -> str: ...


class BytesTokenizer(Tokenizer):
    """One id for each UTF-8 byte (0 to 255), and 256 for the end of a document."""

    def __init__(self) -> None:
        self.spec = BYTES
        self.vocab_size = 257
        self.eod = 256
        self.fingerprint = _fingerprint(BYTES, b"utf-8 bytes, eod 256")

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def _decode(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode(errors="replace")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its ``eos`` piece ends a document."""

    def __init__(self, model_file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        content = _read(model_file)
        try:
            self._processor = SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"{model_file} is not a SentencePiece model") from error
        self.spec = str(model_file.absolute())
        self.vocab_size = self._processor.get_piece_size()
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise DataError(
                f"{model_file} has no end-of-sequence piece to end documents with: train it with eos_id >= 0"
            )
        self.fingerprint = _fingerprint("sentencepiece", content)

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._processor.encode(text), dtype=np.int32)

    def _decode(self, ids: np.ndarray) -> str:
        return str(self._processor.decode(ids.tolist()))


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face ``tokenizer.json``.

    Its end token is the ``eos_token`` of the ``tokenizer_config.json`` or ``special_tokens_map.json`` beside
    it, or else the special token of the file with a usual name. Padding and truncation that the file asks for
    are ignored.
    """

    def __init__(self, json_file: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise SetupError(
                f"{json_file} needs the package tokenizers: pip install 'megacpt[hf]' (or pip install tokenizers)"
            ) from error
        content = _read_json(json_file)
        content.update(padding=None, truncation=None)
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(canonical)
        # The package raises bare Exception for files that it cannot read.
        except Exception as error:
            raise DataError(f"{json_file} is not a Hugging Face tokenizer: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self.spec = str(json_file.absolute())
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eod = self._find_end(json_file, content)
        self.fingerprint = _fingerprint("tokenizer.json", f"{canonical}\neod {self.eod}".encode())

    def _find_end(self, json_file: Path, content: dict[str, Any]) -> int:
        for beside in ("tokenizer_config.json", "special_tokens_map.json"):
            path = json_file.parent / beside
            declared = _read_json(path).get("eos_token") if path.is_file() else None
            name = declared.get("content") if isinstance(declared, dict) else declared
            if isinstance(name, str):
                found = self._tokenizer.token_to_id(name)
                if found is None:
                    raise DataError(f"{path} names the eos_token {name!r}, which {json_file} does not have")
                return int(found)
        special = {token["content"]: token["id"] for token in content.get("added_tokens", []) if token.get("special")}
        for name in _END_NAMES:
            if name in special:
                return int(special[name])
        raise DataError(
            f"{json_file} has no end-of-sequence token to end documents with: put a tokenizer_config.json "
            "beside it "
            f'that says "eos_token" (its special tokens: {", ".join(special) or "none"})'
        )

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def _decode(self, ids: np.ndarray) -> str:
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Make the tokenizer that `spec` names.

    `spec` is ``bytes``, a SentencePiece ``.model`` file, a ``tokenizer.json`` file, or a folder that holds
    one of them (``tokenizer.json`` is taken where there are both, as Hugging Face does).

    Raises DataError when there is no such tokenizer or it has no end token, SetupError when a package is
    missing.
    """
    if str(spec) == BYTES:
        return BytesTokenizer()
    path = Path(spec)
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "tokenizer.model", *sorted(path.glob("*.model"))]
        found = next((file for file in candidates if file.is_file()), None)
        if found is None:
            raise DataError(f"the tokenizer folder {path} holds neither a tokenizer.json nor a tokenizer.model")
        path = found
    if not path.is_file():
        raise DataError(
            f"there is no tokenizer {str(spec)!r}: write 'bytes', or the path of a SentencePiece .model "
            "file, a tokenizer.json, or a folder with one of them"
        )
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type in which Megatron stores such ids: uint16 below a vocabulary of 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def _fingerprint(kind: str, content: bytes) -> str:
    return sha256(kind.encode() + b"\x00" + content).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"the tokenizer file {path} cannot be read: {error.strerror}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content
