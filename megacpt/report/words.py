"""Numbers as a reader of the report wants them."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
UNKNOWN = "\N{EN DASH}"


def short_tokens(number: int) -> str:
    """``1.5M``, ``20k``, ``300``: three significant digits."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if abs(number) >= 0.9995 * size:
            digits = (
                f"{number / size:#.3g}".rstrip("0").rstrip(".")
                if abs(number) < 999.5 * size
                else f"{number / size:.0f}"
            )
            return f"{digits}{letter}"
    return f"{number:,}"


def short_rate(rate: float) -> str:
    """``3e-4``, ``1.65e-4``: a learning rate in as few digits as it has, three at most."""
    if not rate:
        return "0"
    digits, exponent = f"{rate:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def plain(value: float | None, digits: int = 3) -> str:
    """A number with `digits` decimals; a dash where there is none."""
    if value is None:
        return UNKNOWN
    return "not a number" if math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference with its sign; a true minus, and no sign at zero."""
    text = plain(None if value is None else abs(value))
    if value is None or math.isnan(value) or float(text) == 0:
        return text
    return f"{'+' if value > 0 else MINUS}{text}"


def tone(value: float | None) -> str:
    """The class of a difference in loss: worse, better, or neither where it would be written as zero."""
    if value is None or abs(value) < 0.0005:
        return ""
    return "better" if value < 0 else "worse"


def percent(share: float) -> str:
    """``25 %``; one decimal below ten."""
    return f"{100 * share:.1f} %".replace(".0 %", " %") if share < 0.0995 else f"{100 * share:.0f} %"


def shortened(name: str, most: int = 24) -> str:
    """A name of at most `most` characters."""
    return name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
