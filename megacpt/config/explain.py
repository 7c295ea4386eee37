"""What a key means, as text: `megacpt config explain KEY`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Any

from pydantic_core import PydanticUndefined

from megacpt.config.keys import ANY, ITEM, Key, children, find, nearest_key
from megacpt.config.library import configs_folder, names
from megacpt.config.problems import example_text
from megacpt.config.yaml_text import inline, read_document
from megacpt.errors import ConfigError


def explain(key: str = "", width: int = 100) -> str:
    """Describe a key (type, default, meaning, allowed values, example, uses in configs/) or list a section.

    Args:
        key: dotted, such as ``optim.peak_lr`` or ``optim``; empty lists the sections of a run file.
        width: columns to wrap the text to.

    Raises:
        ConfigError: there is no such key; names the nearest.
    """
    path = tuple(key.split(".")) if key else ()
    entries = find(path)
    if key and not entries:
        near = nearest_key(path)
        hint = f"; did you mean '{near}'?" if near else "; `megacpt config explain` lists all sections"
        raise ConfigError(f"unknown key '{key}'{hint}")
    if not key:
        lines = [
            "The keys of a run file (`megacpt config explain KEY` tells more about each):",
            "",
            *_table("", width),
        ]
    elif entries[0].section:
        lines = list(_section(key, entries[0], width))
    else:
        lines = list(_single(key, entries, width))
    return "\n".join(lines)


def _section(key: str, entry: Key, width: int) -> Iterator[str]:
    yield f"{key}: {entry.type}"
    yield from _wrapped(entry.description, width)
    below = children(entry.path)
    if below:
        yield ""
        yield from _table(entry.path, width)
    if key in ("model", "schedule"):
        yield ""
        yield from _wrapped(f"Names in configs/{key}s: {', '.join(names(f'{key}s'))}", width)


def _table(path: str, width: int) -> Iterator[str]:
    rows = [(entries[0].name, _short_default(entries), entries) for entries in children(path)]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, default, entries in rows:
        start = f"  {name:<{first}}  {default:<{second}}  "
        yield from _wrapped(_summary(entries), width, start, " " * len(start))


def _summary(entries: Sequence[Key]) -> str:
    kinds = [kind for entry in entries for kind in entry.kinds]
    if kinds and entries[0].name == "kind":
        return f"One of {', '.join(kinds)}."
    sentence = re.match(r".*?[.:](?=\s|$)", entries[0].description)
    return (sentence[0] if sentence else entries[0].description).removesuffix(":")


def _short_default(entries: Sequence[Key]) -> str:
    if entries[0].name == ANY:
        return ""
    if all(entry.required for entry in entries):
        return "required"
    return "section" if entries[0].section else _default(next(entry for entry in entries if not entry.required))


def _single(key: str, entries: Sequence[Key], width: int) -> Iterator[str]:
    name = key.rpartition(".")[2]
    yield f"{key}: {entries[0].type}"
    if name == "kind" and entries[0].kinds:
        yield from _kinds(entries, width)
    else:
        for entry in entries:
            if entry.kinds:
                yield from _wrapped(
                    f"With {key.rpartition('.')[0]}.kind {' or '.join(entry.kinds)}:", width, "\n  ", "  "
                )
            yield from _details(entry, width)
    example = example_text(entries[0].examples[0]) if entries[0].examples else entries[0].choices[0]
    yield f"\n  In a file:            {name}: {example}"
    yield f"  On the command line:  {key}={example}"
    for item in (below for below in children(entries[0].path) if below[0].name == ITEM):
        yield "\n  Each entry:"
        yield from _table(item[0].path, width)
    uses = list(_uses(key.split(".")))
    if uses:
        yield "\n  In configs/:"
        for value, files in uses:
            yield from _wrapped(f"{value}: {', '.join(files)}", width, "    ", "      ")


def _kinds(entries: Sequence[Key], width: int) -> Iterator[str]:
    for entry in entries:
        default = "" if entry.required else " This is the default."
        yield from _wrapped(f"{entry.choices[0]}: {entry.description}{default}", width, "  ", "      ")


def _details(entry: Key, width: int) -> Iterator[str]:
    yield from _wrapped(entry.description, width)
    if entry.choices or entry.limits:
        yield f"  Allowed: {', '.join(entry.choices) or entry.limits}{', null' if entry.nullable else ''}"
    yield f"  Default: {'none, it must be given' if entry.required else _default(entry)}"


def _uses(path: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The values that the files in configs/ give to a key, each with the names of those files."""
    found: dict[str, list[str]] = {}
    for kind in ("models", "schedules", "runs", "stages"):
        for name in names(kind):
            data: Any = read_document(configs_folder() / kind / f"{name}.yaml").data
            if kind == "models":
                data = {"model": data}
            elif kind == "schedules":
                data = {"schedule": data, "optim": {"peak_lr": data.get("peak_lr", PydanticUndefined)}}
            for part in path:
                data = data.get(part, PydanticUndefined) if isinstance(data, dict) else PydanticUndefined
            if data is not PydanticUndefined:
                found.setdefault(inline(data), []).append(f"{kind}/{name}")
    yield from found.items()


def _default(entry: Key) -> str:
    if entry.default is PydanticUndefined:
        return "derived"
    if isinstance(entry.default, list):
        return inline([getattr(item, "written", item) for item in entry.default])
    return inline(getattr(entry.default, "written", entry.default))


def _wrapped(text: str, width: int, first: str = "  ", rest: str = "  ") -> list[str]:
    return wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
