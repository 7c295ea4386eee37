"""The catalogue of all keys, read off the typed sections, for `explain` and for hints in error messages."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megacpt.config.base import Section
from megacpt.config.quantities import Duration, Part, Rate, Share, Tokens
from megacpt.config.run import RunConfig

ANY = "<name>"
"""Stands in a key for a name that the user chooses, such as that of a stream."""
ITEM = "<number>"
"""Stands in a key for the place of an entry in a list, counted from 0."""

_TYPE_NAMES: dict[Any, str] = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "path",
    Tokens: "number of tokens",
    Share: "share of a whole",
    Duration: "duration",
    Part: "part of a whole",
    Rate: "learning rate",
}
_LIMITS = ((Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "below"))


@dataclass(frozen=True)
class Key:
    """One key of a run file; `kinds` names the variants of its section (as of `schedule`) that have it."""

    path: str
    type: str
    required: bool
    default: Any
    description: str
    choices: tuple[str, ...] = ()
    limits: str = ""
    examples: tuple[Any, ...] = ()
    section: bool = False
    nullable: bool = False
    kinds: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.path.rpartition(".")[2]


def plain(number: float) -> str:
    """A limit as a person writes it: 0.5, 1 or 4294967295."""
    return str(int(number)) if number == int(number) else f"{number:g}"


def members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, without its metadata: ``X | None`` gives ``[X, NoneType]``."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in members(part)]
    return [annotation]


def sections_of(annotation: Any) -> list[type[Section]]:
    """The section classes among the alternatives of an annotation."""
    return [part for part in members(annotation) if isinstance(part, type) and issubclass(part, Section)]


def kind_of(section: type[Section]) -> str | None:
    """The value of `kind` that selects this variant of a section; None where the section has no variants."""
    field = section.model_fields.get("kind")
    values = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
    return str(values[0]) if len(values) == 1 else None


@cache
def catalogue() -> dict[str, tuple[Key, ...]]:
    """All keys of a run file by dotted path; several entries where variants of a section differ in one."""
    found: dict[str, list[Key]] = {}
    for key in _walk(RunConfig, "", ()):
        same = [other for other in found.get(key.path, []) if replace(other, kinds=()) == replace(key, kinds=())]
        if same:
            index = found[key.path].index(same[0])
            found[key.path][index] = replace(same[0], kinds=same[0].kinds + key.kinds)
        else:
            found.setdefault(key.path, []).append(key)
    return {path: tuple(keys) for path, keys in found.items()}


def _walk(section: type[Section], prefix: str, kinds: tuple[str, ...]) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        path = prefix + name
        yield _describe(path, field, kinds)
        for part in members(field.annotation):
            if get_origin(part) is dict:
                value = get_args(part)[1]
                yield _named(f"{path}.{ANY}", value)
                for inner in sections_of(value):
                    yield from _walk(inner, f"{path}.{ANY}.", kinds)
            for inner in _listed(part):
                text = "An entry of the list, counted from 0, with the keys of this section."
                yield Key(f"{path}.{ITEM}", "section", False, None, text, section=True)
                yield from _walk(inner, f"{path}.{ITEM}.", kinds)
        for inner in sections_of(field.annotation):
            kind = kind_of(inner)
            yield from _walk(inner, path + ".", (kind,) if kind else kinds)


def _listed(part: Any) -> list[type[Section]]:
    """The sections that a list holds; none where it holds numbers or names."""
    return sections_of(get_args(part)[0]) if get_origin(part) is list else []


def _describe(path: str, field: FieldInfo, kinds: tuple[str, ...]) -> Key:
    parts = members(field.annotation)
    default = None if field.is_required() else _default(field)
    choices = tuple(str(value) for part in parts if get_origin(part) is Literal for value in get_args(part))
    limits = [
        f"{word} {plain(getattr(item, name))}"
        for item in _metadata(field)
        for limit, name, word in _LIMITS
        if isinstance(item, limit)
    ]
    return Key(
        path=path,
        type=_type_name(field.annotation),
        required=field.is_required(),
        default=default,
        description=field.description or "",
        choices=choices,
        limits=", ".join(limits),
        examples=tuple(field.examples or ()),
        section=bool(sections_of(field.annotation)) or any(get_origin(part) is dict for part in parts),
        nullable=type(None) in parts,
        kinds=kinds,
    )


def _named(path: str, value: Any) -> Key:
    section = bool(sections_of(value))
    if members(value) == [float]:
        text, example = "A name that the run gave a stream, with a number.", "1.0"
    else:
        text, example = "Any name of your choice, with the path of a folder", "data/english"
        text += ", or the keys of this section." if section else "."
    return Key(path, _type_name(value), False, None, text, section=section, examples=(example,))


def _metadata(field: FieldInfo) -> Iterator[Any]:
    yield from field.metadata
    parts = get_args(field.annotation) if get_origin(field.annotation) in (Union, types.UnionType) else ()
    for part in parts:
        if get_origin(part) is Annotated:
            for item in get_args(part)[1:]:
                yield from item.metadata if isinstance(item, FieldInfo) else [item]


def _default(field: FieldInfo) -> Any:
    if field.default is not PydanticUndefined:
        return field.default
    factory = field.default_factory
    if factory is None or field.default_factory_takes_validated_data:
        # kv_heads and head_dim follow from other keys: their descriptions tell how.
        return PydanticUndefined
    return factory()  # type: ignore[call-arg]


def _type_name(annotation: Any) -> str:
    names = []
    for part in members(annotation):
        if get_origin(part) is Literal:
            names.append("one of the values below")
        elif get_origin(part) is dict or (isinstance(part, type) and issubclass(part, Section)):
            names.append("section")
        elif get_origin(part) is list:
            names.append(f"list ({_type_name(get_args(part)[0])})")
        elif part is not type(None):
            names.append(_TYPE_NAMES[part])
    unique = list(dict.fromkeys(names))
    return " or ".join(unique + (["null"] if type(None) in members(annotation) else []))


def find(path: Sequence[str]) -> tuple[Key, ...]:
    """Entries of the catalogue for a key, which may hold names that the user chose; empty if unknown."""
    known = catalogue()
    pattern: list[str] = []
    for part in path:
        if ".".join([*pattern, part]) in known:
            pattern.append(part)
        elif part and ".".join([*pattern, ANY]) in known:
            pattern.append(ANY)
        elif part.isdecimal() and ".".join([*pattern, ITEM]) in known:
            pattern.append(ITEM)
        else:
            return ()
    return known.get(".".join(pattern), ())


def children(path: str) -> list[tuple[Key, ...]]:
    """Entries of the catalogue directly below a section, in order; below the root for an empty path."""
    below = [keys for name, keys in catalogue().items() if name.rpartition(".")[0] == path]
    return sorted(below, key=lambda keys: keys[0].name != "kind" or not keys[0].kinds)


def nearest_key(path: Sequence[str]) -> str | None:
    """The known key nearest to an unknown one: one that ends like it, a sibling, the same word elsewhere."""
    ending = "." + ".".join(path)
    inside = [name for name in catalogue() if ANY not in name and name.endswith(ending)]
    if len(path) > 1 and inside:
        return min(inside, key=len)
    word, parent = path[-1], ".".join(path[:-1])
    siblings = {keys[0].name: keys[0].path for keys in _children_of(path[:-1]) if keys[0].name != ANY}
    by_name: dict[str, str] = {}
    for keys in catalogue().values():
        if ANY not in keys[0].path:
            by_name.setdefault(keys[0].name, keys[0].path)
    for known, cutoff in ((siblings, 0.6), (by_name, 0.9), (siblings, 0.45), (by_name, 0.7)):
        match = get_close_matches(word, list(known), n=1, cutoff=cutoff)
        if match:
            return ".".join([*path[:-1], match[0]]) if known is siblings and parent else known[match[0]]
    whole = get_close_matches(".".join(path), [name for name in catalogue() if ANY not in name], n=1, cutoff=0.6)
    return whole[0] if whole else None


def _children_of(path: Sequence[str]) -> list[tuple[Key, ...]]:
    if not path:
        return children("")
    entries = find(path)
    return children(entries[0].path) if entries else []


def is_section(path: Sequence[str]) -> bool:
    """Whether the key at `path` holds further keys and cannot be null, so that null means no keys."""
    entries = find(path)
    return bool(entries) and entries[0].section and not entries[0].nullable


def is_list(path: Sequence[str]) -> bool:
    """Whether the key at `path` holds a list of sections."""
    entries = find(path)
    return bool(entries) and f"{entries[0].path}.{ITEM}" in catalogue()


def variants(path: Sequence[str]) -> dict[str, type[Section]]:
    """The variants, by `kind`, of a section such as `schedule` or `model.rope.scaling`; empty without any."""
    annotation: Any = RunConfig
    for part in path:
        for section in sections_of(annotation):
            if part in section.model_fields:
                annotation = section.model_fields[part].annotation
                break
        else:
            return {}
    found = {kind_of(section): section for section in sections_of(annotation)}
    return {kind: section for kind, section in found.items() if kind is not None}
