"""Numbers as a person reads them in a terminal."""

from __future__ import annotations


def short_tokens(number: int) -> str:
    """``1.5M``, ``20k``; up to 9,999 in full, beyond that three significant digits."""
    if abs(number) < 10_000:
        return f"{number:,}"
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if abs(number) >= 0.9995 * size:
            scaled = number / size
            digits = max(0, 3 - len(f"{abs(scaled):.0f}"))
            text = f"{scaled:.{digits}f}"
            return (text.rstrip("0").rstrip(".") if "." in text else text) + letter
    raise AssertionError("a number of 10,000 or more has a unit")


def duration(seconds: float) -> str:
    """``48 s``, ``12 min``, ``3 h 05 min``, ``2 d 3 h``."""
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def counted(number: int, word: str) -> str:
    """``1 line``, ``2 lines``."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"
