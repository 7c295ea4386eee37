from __future__ import annotations

import math

import pytest

from megacpt.report import words


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (300, "300"), (999, "999"), (1000, "1k"), (1536, "1.54k"), (20_000, "20k"), (999_400, "999k"),
        (999_600, "1M"), (2_000_000, "2M"), (1_536_000_000, "1.54B"), (300 * 10**9, "300B"), (2 * 10**12, "2T"),
    ],
)  # fmt: skip
def test_tokens(number: int, text: str) -> None:
    assert words.short_tokens(number) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(0.0, "0"), (3e-4, "3e-4"), (1.65e-4, "1.65e-4"), (0.01, "1e-2"), (2.0, "2e0")]
)
def test_rates(rate: float, text: str) -> None:
    assert words.short_rate(rate) == text


@pytest.mark.parametrize(
    ("value", "text", "tone"),
    [
        (0.12, "+0.120", "worse"),
        (-0.12, "\N{MINUS SIGN}0.120", "better"),
        (0.0004, "0.000", ""),
        (-0.0004, "0.000", ""),
        (None, "\N{EN DASH}", ""),
        (math.nan, "not a number", "worse"),
    ],
)
def test_differences(value: float | None, text: str, tone: str) -> None:
    assert (words.signed(value), words.tone(value)) == (text, tone)


@pytest.mark.parametrize(
    ("share", "text"), [(0.25, "25 %"), (0.005, "0.5 %"), (0.05, "5 %"), (0.125, "12 %"), (1, "100 %")]
)
def test_shares(share: float, text: str) -> None:
    assert words.percent(share) == text


def test_long_names_are_shortened() -> None:
    assert words.shortened("x" * 24) == "x" * 24
    assert words.shortened("x" * 25) == "x" * 23 + "…"
