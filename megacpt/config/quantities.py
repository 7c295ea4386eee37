"""Numbers with units, as people write them in a run file: ``20M``, ``25%``, ``500 steps``, ``3e-4``.

Each type reads the written form, computes exactly (with fractions, so that 29 % of 100 is 29 and not 28), and
goes back to the written form when a configuration is saved.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, isfinite
from typing import Any, Literal

from pydantic_core import CoreSchema, core_schema

Scalar = int | float | str

SUFFIXES: dict[str, int] = {
    "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip
MOST = 10**18
"""Largest number of tokens or steps that is read: far above any run, and safe in 64 bits."""
_NUMBER = re.compile(
    r"(?P<digits>[+-]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][+-]?\d{1,3})?)\s*(?P<unit>.*)", re.S | re.A
)


def _split(text: str) -> tuple[Fraction, str] | None:
    """Return the leading number of `text` and what stands behind it, or None where there is no number."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    return Fraction(match["digits"].replace("_", "")), match["unit"].strip()


def _exact(value: int | float) -> Fraction:
    """The decimal number that a person reads in `value`: 0.1 is one tenth, not the double beside it."""
    return Fraction(repr(value if isinstance(value, int) else float(value)))


def _refuse_non_scalars(value: object, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"this must be {wanted}")
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"this must be {wanted}, and finite")


def _schema(parse: Callable[[Any], Any]) -> CoreSchema:
    return core_schema.no_info_plain_validator_function(
        parse,
        serialization=core_schema.plain_serializer_function_ser_schema(lambda quantity: quantity.written),
    )


class Tokens(int):
    """A positive number of tokens, at least one; an ``int`` that remembers how it was written (``20M``)."""

    written: int | str
    EXPECTED = "a number of tokens, such as 20M, 1.5B, 300000 or 64Ki"

    def __new__(cls, value: int, written: int | str | None = None) -> Tokens:
        """Make it from a number and, where that differs, the form in which it was written."""
        made = super().__new__(cls, value)
        made.written = int(value) if written is None else written
        return made

    @classmethod
    def parse(cls, value: object) -> Tokens:
        """Read ``20M``, ``1.5B``, ``2_000_000``, ``64Ki`` or a whole number; else raise ValueError."""
        if isinstance(value, Tokens):
            return value
        _refuse_non_scalars(value, cls.EXPECTED)
        assert isinstance(value, (int, float, str))
        number = _count(value, cls.EXPECTED)
        if not 1 <= number <= MOST:
            raise ValueError(f"this must be at least one token, and at most 10^18: write {cls.EXPECTED}")
        return cls(number, value if isinstance(value, str) else number)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return _schema(cls.parse)


def _count(value: Scalar, expected: str) -> int:
    if not isinstance(value, str):
        amount = _exact(value)
    else:
        parts = _split(value)
        if parts is None:
            raise ValueError(f"this is not {expected}")
        amount = parts[0] * _factor(parts[1].removesuffix("tokens").removesuffix("token").strip(), expected)
    if amount.denominator != 1:
        raise ValueError(f"this is not a whole number: write {expected}")
    return int(amount)


def _factor(suffix: str, expected: str) -> int:
    if not suffix:
        return 1
    try:
        return SUFFIXES[suffix.lower()]
    except KeyError:
        raise ValueError(
            f"unknown unit '{suffix}': write {expected} (K, M, B, T are powers of 1000; Ki, Mi, Gi, Ti of 1024)"
        ) from None


class Share(float):
    """A part of a whole, 0 to 1; a ``float`` that remembers how it was written (``25%``)."""

    written: Scalar
    EXPECTED = "a share from 0% to 100%, such as 25% or 0.25"

    def __new__(cls, value: float, written: Scalar | None = None) -> Share:
        """Make it from a number and, where that differs, the form in which it was written."""
        made = super().__new__(cls, value)
        made.written = float(value) if written is None else written
        return made

    @classmethod
    def parse(cls, value: object) -> Share:
        """Read ``25%`` or ``0.25``; raise ValueError outside 0 to 1, and for a bare 1 (1 % or all?)."""
        if isinstance(value, Share):
            return value
        _refuse_non_scalars(value, cls.EXPECTED)
        assert isinstance(value, (int, float, str))
        if isinstance(value, int) and value == 1:
            raise ValueError("1 could mean one percent or everything: write 1% or 100%")
        amount = _percent_or_plain(value, cls.EXPECTED)[0]
        if not 0 <= amount <= 1:
            hint = f"; did you mean {value}%?" if not str(value).endswith("%") and amount <= 100 else ""
            raise ValueError(f"this must be {cls.EXPECTED}{hint}")
        return cls(float(amount), value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return _schema(cls.parse)


def _percent_or_plain(value: Scalar, expected: str) -> tuple[Fraction, bool]:
    """Read ``25%`` as (1/4, True) and ``0.25`` as (1/4, False)."""
    if not isinstance(value, str):
        return _exact(value), False
    parts = _split(value)
    if parts is None or parts[1] not in ("", "%"):
        raise ValueError(f"this is not {expected}")
    return (parts[0] / 100, True) if parts[1] else (parts[0], False)


@dataclass(frozen=True)
class Duration:
    """A stretch of a stage: a share of the stage, a number of steps, or a number of tokens.

    `amount` is exact; `unit` says of what. Two durations are equal when both agree, however written.
    """

    amount: Fraction
    unit: Literal["share", "steps", "tokens"]
    written: Scalar = field(compare=False)

    EXPECTED = "a duration with its unit, such as 1%, '500 steps' or '20M tokens'"

    @classmethod
    def parse(cls, value: object) -> Duration:
        """Read ``1%``, ``500 steps``, ``20M tokens``, ``20M`` or 0; raise ValueError without a unit."""
        if isinstance(value, Duration):
            return value
        _refuse_non_scalars(value, cls.EXPECTED)
        assert isinstance(value, (int, float, str))
        parts = _split(value) if isinstance(value, str) else (_exact(value), "")
        if parts is None:
            raise ValueError(f"this is not {cls.EXPECTED}")
        amount, unit = parts
        if amount < 0:
            raise ValueError(f"this must not be negative: write {cls.EXPECTED}")
        if not unit and amount != 0:
            raise ValueError(f"the unit is missing: write '{value} steps', '{value} tokens' or a percentage")
        if unit == "%":
            if amount > 100:
                raise ValueError("a percentage of the stage must not be above 100%")
            return cls(amount / 100, "share", value)
        return cls._counted(amount, unit, value)

    @classmethod
    def _counted(cls, amount: Fraction, unit: str, value: Scalar) -> Duration:
        words = re.fullmatch(r"(.*?)\s*(steps?|tokens?)?", unit)
        assert words is not None
        amount *= _factor(words[1], cls.EXPECTED)
        if amount > MOST:
            raise ValueError(f"this must be at most 10^18: write {cls.EXPECTED}")
        if amount.denominator != 1:
            raise ValueError(f"this is not a whole number of {words[2] or 'tokens'}: write {cls.EXPECTED}")
        return cls(amount, "steps" if (words[2] or "").startswith("step") else "tokens", value)

    def tokens(self, stage_tokens: int, tokens_per_step: int) -> int:
        """Tokens in this duration, given those of the stage and of one step; rounded to the nearest."""
        if self.unit == "share":
            return int(self.amount * stage_tokens + Fraction(1, 2))
        return int(self.amount) * (tokens_per_step if self.unit == "steps" else 1)

    def steps(self, stage_tokens: int, tokens_per_step: int) -> int:
        """Optimizer steps that cover this duration: rounded up, so that above zero there is at least one."""
        if self.unit == "steps":
            return int(self.amount)
        tokens = self.amount * stage_tokens if self.unit == "share" else self.amount
        return ceil(tokens / tokens_per_step)

    def __str__(self) -> str:
        return str(self.written)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return _schema(cls.parse)


class Part(Duration):
    """How much of something that lies there, such as a stream: a percentage of it, or a number of tokens."""

    EXPECTED = "a part of the whole, such as 25%, or tokens with their unit, such as 20M or '300000 tokens'"

    @classmethod
    def parse(cls, value: object) -> Duration:
        """Read ``25%``, ``20M`` or ``300000 tokens``; raise ValueError for steps, for 0, and without a unit."""
        part = super().parse(value)
        if part.unit == "steps" or part.amount == 0:
            raise ValueError(f"this must be {cls.EXPECTED}")
        return part


@dataclass(frozen=True)
class Rate:
    """A learning rate: absolute (``3e-5``), or relative to the peak rate (``10%``)."""

    amount: Fraction
    relative: bool
    written: Scalar = field(compare=False)

    EXPECTED = "a learning rate such as 3e-5, or a percentage of the peak rate such as 10%"

    @classmethod
    def parse(cls, value: object) -> Rate:
        """Read ``3e-5``, ``0`` or ``10%``; raise ValueError for negative rates and those above 100% or 1000."""
        if isinstance(value, Rate):
            return value
        _refuse_non_scalars(value, cls.EXPECTED)
        assert isinstance(value, (int, float, str))
        amount, relative = _percent_or_plain(value, cls.EXPECTED)
        if not 0 <= amount <= (1 if relative else 1000):
            raise ValueError(f"this must not be negative, nor above 100% or 1000: write {cls.EXPECTED}")
        return cls(amount, relative, value)

    def value(self, peak: float) -> float:
        """The absolute learning rate, given the peak rate."""
        return float(self.amount * _exact(peak)) if self.relative else float(self.amount)

    def __str__(self) -> str:
        return str(self.written)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return _schema(cls.parse)
