"""Text with noise of known strength."""

from __future__ import annotations

import json

from megacpt.recipes.texts import enciphered, noisy

LINES = [
    json.dumps({"text": f"{number} " + "The sea is calm tonight, ëë. " * 60, "source": "here"}) for number in range(40)
]


def test_the_score_is_the_share_of_characters_that_were_left_alone() -> None:
    shares = []
    for before, after in zip(LINES, noisy(LINES, 0.5).decode().splitlines(), strict=True):
        old, new = json.loads(before)["text"], json.loads(after)
        assert len(old) == len(new["text"])
        same = sum(a == b for a, b in zip(old, new["text"], strict=True)) / len(old)
        assert abs(same - new["score"]) < 0.05  # some are replaced by themselves
        shares.append(1 - new["score"])
    assert 0 <= min(shares) < 0.1
    assert 0.4 < max(shares) <= 0.5


def test_what_becomes_of_a_document_follows_from_its_text_alone() -> None:
    assert noisy(LINES[::-1], 0.5).decode().splitlines() == noisy(LINES, 0.5).decode().splitlines()[::-1]
    assert json.loads(noisy(LINES[:1], 0.0))["text"] == json.loads(LINES[0])["text"]


def test_an_enciphered_text_has_the_same_signs_in_other_places() -> None:
    lines = [json.dumps({"text": "The sea, at Dover: Überall 17 zephyrs.", "source": "here"})]
    (line,) = enciphered(lines).decode().splitlines()
    assert json.loads(line) == {"text": "Gur frn, ng Qbire: Üorenyy 17 mrculef.", "source": "here"}
    assert enciphered([line]).decode().splitlines() == [json.dumps(json.loads(lines[0]), ensure_ascii=False)]
