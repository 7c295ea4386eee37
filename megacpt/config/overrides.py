"""Changes on top of a file: ``KEY=VALUE`` from the command line, and the merge of a stage file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megacpt.config.base import Problem
from megacpt.config.keys import find, is_list, is_section, nearest_key, variants
from megacpt.config.library import model_path
from megacpt.config.problems import example_text
from megacpt.config.yaml_text import Document, KeyPath, inline, parse_value, read_document
from megacpt.errors import ConfigError

REPLACED: tuple[KeyPath, ...] = (("stage",), ("stage", "mixture"))
"""Sections that a stage file replaces as a whole: a new stage does not inherit the old one's mixture."""
NULL_REMOVES: tuple[KeyPath, ...] = (("evaluate", "streams"),)
"""Sections in which a stage file drops an inherited entry by setting it to null."""
SHORT_STREAMS: tuple[KeyPath, ...] = (("stage", "mixture"), ("stage", "replay", "streams"))
"""Sections in which a path alone is short for a stream with that path."""


@dataclass(frozen=True)
class Override:
    """One ``KEY=VALUE``: the path of the key, the value as YAML reads it, and the text as it was given."""

    path: KeyPath
    value: Any
    text: str


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """Read ``optim.peak_lr=3e-4 parallel.tensor=2 ...``; raise ConfigError that lists all that are wrong."""
    found, mistakes = [], []
    for text in texts:
        try:
            found.append(_parse(text))
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return found


def _parse(text: str) -> Override:
    key, equals, value = text.partition("=")
    key = key.strip()
    path = tuple(key.split("."))
    if not equals:
        known = find(path)
        example = f"{key}={_example(key)}" if known and not known[0].section else "optim.peak_lr=3e-4"
        raise ConfigError(f"'{text}' is not a change of the configuration: write KEY=VALUE, such as {example}")
    if not find(path):
        near = nearest_key(path)
        hint = f"; did you mean '{near}'?" if near else "; `megacpt config explain` lists all keys"
        raise ConfigError(f"'{text}': unknown key '{key}'{hint}")
    try:
        return Override(path, parse_value(value), text)
    except ConfigError as error:
        raise ConfigError(f"'{text}': {error}") from None


def _example(key: str) -> str:
    known = find(key.split("."))[0]
    return example_text(known.examples[0]) if known.examples else (known.choices or ("VALUE",))[0]


def apply_overrides(data: dict[str, Any], overrides: Sequence[Override]) -> list[Problem]:
    """Change `data` in place, in the order given; return problems (a key below what is not a section)."""
    problems = []
    given = {override.path for override in overrides}
    for override in overrides:
        *parents, last = override.path
        section: Any = data
        for depth, part in enumerate(parents):
            value = section.get(part) if isinstance(section, dict) else _entry(section, part)
            inner = _opened(value, tuple(parents[: depth + 1]))
            if not isinstance(inner, dict) and not (isinstance(inner, list) and depth + 1 < len(parents)):
                where = ".".join(parents[: depth + 1])
                problems.append(Problem(".".join(override.path), f"{where} is {inline(inner)}, not a section"))
                break
            section[part if isinstance(section, dict) else int(part)] = inner
            section = inner
        else:
            if last == "kind":
                keep = {path[-1] for path in given if path[:-1] == tuple(parents)}
                switch_kind(section, override.value, tuple(parents), keep)
            if parents[:1] == ["model"] and override.path != ("model", "name"):
                mark_changed(data["model"])
            section[last] = override.value
    return problems


def _entry(entries: list[Any], part: str) -> Any:
    """Return an entry of a list, or say that there is none."""
    return entries[int(part)] if part.isdecimal() and int(part) < len(entries) else "missing"


def _opened(value: Any, path: KeyPath) -> Any:
    """Give a short form its long one, so that a key below it can be set."""
    if value is None:
        return [] if is_list(path) else {}
    if isinstance(value, list):
        return list(value)
    if isinstance(value, str) and path == ("model",):
        return named_model(value).data
    if isinstance(value, str) and path[:-1] in SHORT_STREAMS:
        return {"path": value}
    return dict(value) if isinstance(value, Mapping) else value


def mark_changed(model: dict[str, Any]) -> None:
    """Note in the label of a model that it is no longer the one in the file of that name."""
    name = model.get("name")
    if isinstance(name, str) and not name.endswith(" (changed)"):
        model["name"] = f"{name} (changed)"


def named_model(name: str) -> Document:
    """Read the keys of a model given by name or path; its name defaults to that of the file."""
    try:
        path = model_path(name)
        document = read_document(path)
    except ConfigError as error:
        raise ConfigError(f"model: {error}") from None
    return Document({"name": path.stem, **document.data}, document.places)


def switch_kind(section: dict[str, Any], kind: Any, path: KeyPath, keep: Collection[str] = ()) -> None:
    """Drop the keys that another kind of this section does not have; values that it shares stay.

    Going from ``schedule.kind: infinite`` to ``cosine`` drops `cooldown` and keeps `min_lr`. Names in `keep`
    stay in any case, so that a key that the user just gave is checked and not lost.
    """
    known = variants(path)
    if kind not in known or section.get("kind") == kind:
        return
    of_others = {name for variant in known.values() for name in variant.model_fields} - set(known[kind].model_fields)
    for name in of_others.difference(keep):
        section.pop(name, None)


def merge(parent: Mapping[str, Any], child: Mapping[str, Any], path: KeyPath = ()) -> dict[str, Any]:
    """Lay the keys of a stage file over those of its parent; neither is changed."""
    merged = dict(parent)
    for key, value in child.items():
        here = (*path, key)
        if value is None and path in NULL_REMOVES:
            merged.pop(key, None)
        elif value is None and is_section(here):
            continue
        elif not isinstance(value, Mapping) or not isinstance(merged.get(key), Mapping) or here in REPLACED:
            merged[key] = value
        else:
            base = dict(merged[key])
            if "kind" in value:
                switch_kind(base, value["kind"], here)
            merged[key] = merge(base, value, here)
    return merged
