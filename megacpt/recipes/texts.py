"""The streams of a recipe, from the real text of `megacpt demo`, some with noise of known strength."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from megacpt.data.files import write_bytes
from megacpt.data.prepare import prepare
from megacpt.demo.corpora import write_corpora
from megacpt.recipes.recipe import Texts

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
        corpus = corpora[text.domain]
        found[name], noise = out / "data" / name, float(text.noise)
        if noise:
            source = out / "texts" / f"{name}.jsonl"
            if not source.is_file():
                write_bytes(source, noisy(corpus.train.read_text(encoding="utf-8").splitlines(), noise))
            prepare([source], "bytes", found[name], workers=1, progress=False, score=SCORE)
        else:
            prepare([corpus.train], "bytes", found[name], workers=1, progress=False)
        held_out = f"{text.domain}-valid"
        found[held_out] = out / "data" / held_out
        prepare([corpus.valid], "bytes", found[held_out], workers=1, progress=False)
    return found


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
