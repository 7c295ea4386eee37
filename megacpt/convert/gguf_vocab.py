"""A tokenizer as GGUF describes it, so that llama.cpp splits text as it was split in training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megacpt.convert.tokenizer_files import END, byte_characters, sentencepiece_model
from megacpt.data.tokenizer import BytesTokenizer, SentencePieceTokenizer, Tokenizer

log = logging.getLogger(__name__)
# A merge of characters that stand for no byte: llama.cpp asks for a list of merges, and this one never applies.
_NEVER = "▁ ▁"


def add_vocabulary(writer: Any, tokenizer: Tokenizer, rows: int) -> None:
    """Describe a tokenizer.

    The tokenizer of bytes becomes a byte-level BPE without merges, a SentencePiece model of byte pairs becomes
    llama.cpp's SPM. Of any other, llama.cpp gets the number of ids alone ("none"): it runs on ids, not on text.

    Args:
        writer: a GGUFWriter.
        tokenizer: of the model.
        rows: of the embedding that is written.
    """
    import gguf

    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    if isinstance(tokenizer, BytesTokenizer):
        tokens = [*byte_characters(), END]
        types = [*[normal] * 256, control]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([_NEVER])
    elif isinstance(tokenizer, SentencePieceTokenizer) and _is_byte_pairs(Path(tokenizer.spec)):
        tokens, scores, types, prefix = _pieces(Path(tokenizer.spec))
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([*scores, *[0.0] * (rows - len(scores))])
        writer.add_add_space_prefix(prefix)
    else:
        log.warning(
            "llama.cpp gets no tokenizer: `bytes` and SentencePiece models of byte pairs have a form in GGUF here. "
            "The file runs on token ids, not on text"
        )
        writer.add_tokenizer_model("none")
        return
    missing = range(len(tokens), rows)
    writer.add_token_list([*tokens, *(f"[unused{number}]" for number in missing)])
    writer.add_token_types([*types, *[int(gguf.TokenType.UNUSED) for _ in missing]])
    writer.add_eos_token_id(tokenizer.eod)
    writer.add_bos_token_id(tokenizer.eod)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _is_byte_pairs(file: Path) -> bool:
    model = sentencepiece_model(file)
    return bool(model.trainer_spec.model_type == model.trainer_spec.BPE)


def _pieces(file: Path) -> tuple[list[str], list[float], list[int], bool]:
    """Pieces, their scores and types (SentencePiece's numbers are GGUF's), and whether texts begin with a space."""
    model = sentencepiece_model(file)
    pieces = model.pieces
    prefix = bool(model.normalizer_spec.add_dummy_prefix)
    return [p.piece for p in pieces], [p.score for p in pieces], [int(p.type) for p in pieces], prefix
