from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config.quantities import SUFFIXES, Duration, Rate, Share, Tokens
from megacpt.config.yaml_text import parse_value, write_yaml

UNITS = ["", "K", "k", "M", "B", "G", "T", "Ki", "Mi", "Gi", "Ti"]
MOST = 10**18


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("20M", 20_000_000),
        ("20 M", 20_000_000),
        ("1.5B", 1_500_000_000),
        ("0.3k", 300),
        (".5M", 500_000),
        ("64Ki", 65536),
        ("1.5Ki", 1536),
        ("2_000_000", 2_000_000),
        ("1e6", 1_000_000),
        ("300B tokens", 300_000_000_000),
        ("1 token", 1),
        ("2T", 2_000_000_000_000),
        (300_000, 300_000),
        (1e6, 1_000_000),
    ],
)
def test_tokens(text: Any, tokens: int) -> None:
    assert Tokens.parse(text) == tokens


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("20X", "unknown unit 'X'"),
        ("many", "this is not a number of tokens"),
        ("", "this is not a number of tokens"),
        ("1.5", "this is not a whole number"),
        ("1.0005K", "this is not a whole number"),
        (2.5, "this is not a whole number"),
        (0, "at least one token"),
        (-3, "at least one token"),
        ("-3M", "at least one token"),
        (True, "this must be a number of tokens"),
        (None, "this must be a number of tokens"),
        ([1], "this must be a number of tokens"),
        (float("nan"), "finite"),
        ("500 steps", "unknown unit 'steps'"),
        ("10%", "unknown unit '%'"),
        ("1e999999999", "unknown unit"),
        ("1e19", "at most 10.18"),
        (1e300, "at most 10.18"),
    ],
)
def test_wrong_tokens(text: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Tokens.parse(text)


@pytest.mark.parametrize(
    ("text", "share"),
    [("25%", 0.25), ("0%", 0.0), ("100%", 1.0), (0.25, 0.25), ("0.5", 0.5), (0, 0.0), ("0.1%", 0.001)],
)
def test_shares(text: Any, share: float) -> None:
    assert Share.parse(text) == share


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("101%", "from 0% to 100%"),
        ("-1%", "from 0% to 100%"),
        (5, "did you mean 5%"),
        (1.5, "did you mean 1.5%"),
        (1, "one percent or everything"),
        ("a quarter", "this is not a share"),
        ("25 M", "this is not a share"),
        (False, "this must be a share"),
    ],
)
def test_wrong_shares(text: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Share.parse(text)


@pytest.mark.parametrize(
    ("text", "tokens", "steps"),
    [
        ("1%", 200_000, 25),
        ("500 steps", 4_096_000, 500),
        ("1 step", 8192, 1),
        ("2k steps", 16_384_000, 2000),
        ("2M tokens", 2_000_000, 245),
        ("2M", 2_000_000, 245),
        ("1 token", 1, 1),
        ("0%", 0, 0),
        (0, 0, 0),
        ("100%", 20_000_000, 2442),
    ],
)
def test_durations(text: Any, tokens: int, steps: int) -> None:
    duration = Duration.parse(text)
    assert duration.tokens(20_000_000, 8192) == tokens
    assert duration.steps(20_000_000, 8192) == steps


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (500, "the unit is missing: write '500 steps', '500 tokens' or a percentage"),
        ("500", "the unit is missing"),
        (0.01, "the unit is missing"),
        ("-1 steps", "must not be negative"),
        ("101%", "above 100%"),
        ("1.5 steps", "not a whole number of steps"),
        ("3 epochs", "unknown unit 'epochs'"),
        ("soon", "this is not a duration"),
        ("1e19 steps", "at most 10.18"),
        (True, "this must be a duration"),
    ],
)
def test_wrong_durations(text: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Duration.parse(text)


def test_shares_of_a_stage_are_exact() -> None:
    # In binary floating point 0.29 * 100 is 28.999999999999996.
    assert Duration.parse("29%").tokens(100, 1) == 29
    assert Duration.parse("10%").steps(1000 * 8192, 8192) == 100
    assert Duration.parse("33.3%").tokens(10**15, 1) == 333 * 10**12


@pytest.mark.parametrize(
    ("text", "rate"),
    [("10%", 3e-5), ("55%", 1.65e-4), ("100%", 3e-4), (3e-5, 3e-5), ("3e-5", 3e-5), (0, 0.0), ("0%", 0.0)],
)
def test_rates(text: Any, rate: float) -> None:
    assert Rate.parse(text).value(3e-4) == rate


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("-1e-4", "negative"),
        ("101%", "above 100%"),
        ("1e999", "1000"),
        ("slow", "this is not a learning rate"),
        (None, "this must be"),
    ],
)
def test_wrong_rates(text: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Rate.parse(text)


def test_equality_is_by_value() -> None:
    assert Duration.parse("1000 steps") == Duration.parse("1k steps")
    assert Duration.parse("20M") == Duration.parse("20M tokens")
    assert Duration.parse("10 steps") != Duration.parse("10 tokens")
    assert Rate.parse("10%") == Rate.parse("10.0%")
    assert Rate.parse("10%") != Rate.parse("0.1")


@pytest.mark.parametrize(
    "made", [Tokens.parse("20M"), Share.parse("25%"), Duration.parse("500 steps"), Rate.parse("10%")]
)
def test_copies_keep_the_written_form(made: Any) -> None:
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert copied == made
        assert copied.written == made.written


numbers = st.one_of(
    st.integers(1, 10**6).map(str),
    st.integers(1, 10**6).map(lambda n: f"{n:_}"),
    st.decimals("0.001", "1000", places=3).map(str),
)


def _survives(parse: Callable[[object], Any], value: object) -> None:
    """The quantity, dumped to YAML and read back, is equal and was written in the same way."""
    made = parse(value)
    again = parse(parse_value(write_yaml({"x": made.written}).removeprefix("x: ")))
    assert again == made
    assert again.written == made.written


@given(numbers, st.sampled_from(UNITS), st.sampled_from(["", " "]), st.sampled_from(["", "tokens"]))
def test_tokens_survive_yaml(number: str, unit: str, space: str, word: str) -> None:
    exact = Fraction(number.replace("_", "")) * SUFFIXES.get(unit.lower(), 1)
    text = f"{number}{space}{unit}{space}{word}"
    if exact.denominator != 1:
        with pytest.raises(ValueError, match="whole number"):
            Tokens.parse(text)
    elif exact > MOST:
        with pytest.raises(ValueError, match="at most"):
            Tokens.parse(text)
    else:
        assert Tokens.parse(text) == exact
        _survives(Tokens.parse, text)


@given(st.one_of(st.integers(1, 10**18), st.integers(1, 10**6).map(float)))
def test_plain_tokens_survive_yaml(number: int | float) -> None:
    assert Tokens.parse(number) == number
    _survives(Tokens.parse, number)


@given(st.one_of(st.floats(0, 1, exclude_max=True), st.decimals(0, 100, places=4).map(lambda n: f"{n}%")))
def test_shares_survive_yaml(value: float | str) -> None:
    assert 0 <= Share.parse(value) <= 1
    _survives(Share.parse, value)


@given(
    st.one_of(st.integers(1, 10**9).map(lambda n: f"{n} steps"), st.decimals(0, 100, places=2).map(lambda n: f"{n}%"))
)
def test_durations_survive_yaml(value: str) -> None:
    _survives(Duration.parse, value)


@given(st.one_of(st.floats(0, 1e3), st.floats(0, 1).map(repr), st.decimals(0, 100, places=3).map(lambda n: f"{n}%")))
def test_rates_survive_yaml(value: float | str) -> None:
    _survives(Rate.parse, value)


@given(st.integers(1, 10**13), st.integers(1, 10**8), st.decimals("0.01", 100, places=2))
def test_steps_cover_the_tokens(stage: int, step: int, percent: Any) -> None:
    duration = Duration.parse(f"{percent}%")
    steps, exact = duration.steps(stage, step), Fraction(percent) / 100 * stage
    assert (steps - 1) * step < exact <= steps * step
    assert abs(duration.tokens(stage, step) - exact) <= Fraction(1, 2)
