"""What a rank runs: conversions, by right rules and wrong ones, and their verification."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megacpt.cli.making import verified
from megacpt.convert import foreign
from megacpt.convert.families import LLAMA
from megacpt.convert.families.rows import KEY, QUERY, Rows
from megacpt.convert.families.table import Entry, Family
from megacpt.convert.from_hf import from_hf
from megacpt.convert.to_hf import to_hf
from megacpt.convert.verification import verify
from megacpt.errors import MegacptError


def _interleaved(rows: Rows) -> Rows:
    """Rows of heads as they lie where neighbouring dims are rotated together."""

    def numbers(model: Any, total: int) -> torch.Tensor:
        found = rows.numbers(model, total)
        assert found is not None
        return found.view(-1, 2, model.head_dim // 2).transpose(1, 2).reshape(-1)

    return Rows("interleaved", numbers)


def _changed(rule: str) -> Family:
    """The family of Llamas with a wrong rule."""
    wrong = {"swapped": {QUERY: KEY, KEY: QUERY}, "rotated": {r: _interleaved(r) for r in (QUERY, KEY)}}[rule]

    def entry(line: Entry) -> Entry:
        return replace(line, theirs=tuple((name, wrong.get(rows, rows)) for name, rows in line.theirs))

    return replace(LLAMA, entries=tuple(entry(line) for line in LLAMA.entries))


def converted(folder: str, out: str, rule: str | None = None, dtype: str = "float32") -> str | None:
    """Convert and verify as the command does; return what was refused."""
    kept = foreign.FAMILIES
    if rule is not None:
        foreign.FAMILIES = {**kept, "llama": _changed(rule)}
    try:
        from_hf(Path(folder), Path(out), "bytes", dtype)
        verified(Path(out), Path(folder), Path(out))
    except MegacptError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        foreign.FAMILIES = kept
    return None


def exported(run: str, out: str, dtype: str | None = None) -> str | None:
    """Export and verify as the command does; return what was refused."""
    try:
        to_hf(Path(run), Path(out), dtype)
        verified(Path(run), Path(out), Path(out))
    except MegacptError as error:
        return f"{type(error).__name__}: {error}"
    return None


def compared(run: str, folder: str, out: str, **options: Any) -> str:
    """What a verification says."""
    try:
        return verify(Path(run), Path(folder), Path(out), **options).line()
    except MegacptError as error:
        return f"{type(error).__name__}: {error}"
