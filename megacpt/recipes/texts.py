"""The streams of a recipe, from the real text of `megacpt demo`, some with noise of known strength, some enciphered."""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from megacpt.data.files import write_bytes
from megacpt.data.prepare import prepare
from megacpt.demo.corpora import Corpus, write_corpora
from megacpt.recipes.recipe import Domain, Texts

SCORE = "score"
# What stands in for a character: a letter, a digit, a sign or a space, none more likely than another.
_SIGNS = "abcdefghijklmnopqrstuvwxyz0123456789 .,;:(){}[]+-*/=_<>\"'"


def prepare_texts(texts: Texts, out: Path) -> dict[str, Path]:
    """Write and tokenise the streams of a recipe, or return at once where that is done.

    Returns:
        Folders by name: the streams, and ``DOMAIN-valid`` with the held-out text of each domain among them.
    """
    corpora = write_corpora(out / "texts", texts.bytes)
    found: dict[str, Path] = {}
    for name, text in texts.streams.items():
        train, valid = _files(text.domain, corpora, out / "texts")
        found[name], noise = out / "data" / name, float(text.noise)
        if noise:
            source = out / "texts" / f"{name}.jsonl"
            if not source.is_file():
                write_bytes(source, noisy(train.read_text(encoding="utf-8").splitlines(), noise))
            prepare([source], "bytes", found[name], workers=1, progress=False, score=SCORE)
        else:
            prepare([train], "bytes", found[name], workers=1, progress=False)
        held_out = f"{text.domain}-valid"
        found[held_out] = out / "data" / held_out
        prepare([valid], "bytes", found[held_out], workers=1, progress=False)
    return found


def _files(domain: Domain, corpora: Mapping[str, Corpus], folder: Path) -> tuple[Path, Path]:
    """Return the text of a domain to train on and the held-out one; write them where they are derived."""
    if domain != "rot13":
        return corpora[domain].train, corpora[domain].valid
    english = corpora["english"]
    train, valid = (folder / f"rot13-{part}.jsonl" for part in ("train", "valid"))
    for source, path in ((english.train, train), (english.valid, valid)):
        if not path.is_file():
            write_bytes(path, enciphered(source.read_text(encoding="utf-8").splitlines()))
    return train, valid


def enciphered(lines: Iterable[str]) -> bytes:
    """Return JSON lines whose text has each letter from A to Z moved by 13 places, and everything else as it was."""
    documents = (json.loads(line) for line in lines)
    moved = ({**document, "text": codecs.encode(document["text"], "rot13")} for document in documents)
    return "".join(f"{json.dumps(document, ensure_ascii=False)}\n" for document in moved).encode()


def noisy(lines: Iterable[str], most: float) -> bytes:
    """Return JSON lines whose text has characters replaced, a share drawn from 0 to `most` for each document.

    What becomes of a document follows from its text alone. Its score is 1 minus the share.
    """
    return "".join(f"{line}\n" for line in _noisy(lines, most)).encode()


def _noisy(lines: Iterable[str], most: float) -> Iterator[str]:
    for line in lines:
        text = json.loads(line)["text"]
        draw = random.Random(text)
        share = draw.uniform(0, most)
        changed = "".join(draw.choice(_SIGNS) if draw.random() < share else sign for sign in text)
        yield json.dumps({"text": changed, SCORE: round(1 - share, 6)}, ensure_ascii=False)
