"""From pydantic's findings to messages that a person can act on: key, value, reason, a right example."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from megacpt.config.base import PROBLEMS, Problem
from megacpt.config.keys import catalogue, find, nearest_key, plain, variants
from megacpt.config.yaml_text import KeyPath, short
from megacpt.errors import nearest

_LIMIT_WORDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}
_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text; put it in quotes if it looks like a number",
    "path": "a path; put it in quotes if it looks like a number",
    "dict": "a section with keys and values below it",
    "model": "a section with keys and values below it",
}


def problems_of(error: ValidationError, prefix: KeyPath = ()) -> list[Problem]:
    """All mistakes in `error`, each under its full dotted key, in the order in which pydantic found them."""
    found: list[Problem] = []
    for item in error.errors(include_url=False):
        path = _key_path((*prefix, *(str(part) for part in item["loc"])))
        if item["type"] == PROBLEMS:
            found += [problem.under(".".join(path)) for problem in item["ctx"]["problems"]]
        elif item["type"] != "default_factory_not_called":  # follows from a mistake that is listed
            found.append(_problem(path, item["type"], item["msg"], item["input"], item.get("ctx", {})))
    return found


def _key_path(loc: Sequence[str]) -> KeyPath:
    """Take out what pydantic puts between the keys: the kind of a section with variants, and ``[key]``."""
    path: list[str] = []
    for part in loc:
        if part != "[key]" and not (path and part in variants(path)):
            path.append(part)
    return tuple(path)


def _problem(path: KeyPath, error: str, message: str, value: Any, context: Mapping[str, Any]) -> Problem:
    key = ".".join(path)
    if error == "extra_forbidden":
        return Problem(key, unknown_key(path))
    if error == "missing":
        return Problem(key, f"missing: {_example(path)}")
    if error.startswith("union_tag"):
        kinds = list(variants(path))
        if error == "union_tag_not_found":
            return Problem(f"{key}.kind", f"missing: write one of {', '.join(kinds)}")
        return Problem(f"{key}.kind", _choice(str(context.get("tag")), kinds))
    if error == "string_pattern_mismatch":
        allowed = "letters, digits, '_' and '-'" + (" and '.'" if path == ("stage", "name") else "")
        return Problem(key, f"{_shown(value)} is not a name: it may hold {allowed}, and starts with a letter or digit")
    return Problem(key, f"{_shown(value)}: {_reason(path, error, message, value, context)}")


def _reason(path: KeyPath, error: str, message: str, value: Any, context: Mapping[str, Any]) -> str:
    if error == "value_error":
        return _without_repeat(str(context["error"]), path)
    if error == "literal_error":
        entries = find(path)  # empty for an entry of a list
        choices = entries[0].choices if entries else re.findall("'([^']*)'", context["expected"])
        return _choice("", choices, str(value))
    if error in _LIMIT_WORDS:
        name, words = _LIMIT_WORDS[error]
        return f"this must be {words} {plain(context[name])}"
    if error == "too_short":
        return "this must hold at least one entry"
    if error == "string_too_short":
        return f"this must not be empty; {_example(path)}"
    wanted = _WANTED.get(error.partition("_")[0])
    return f"this must be {wanted}; {_example(path)}" if wanted else message


def _without_repeat(text: str, path: KeyPath) -> str:
    # The quantities name right values themselves; only those messages that do not get an example.
    return text if "such as" in text or "write" in text or "%" in text else f"{text}; {_example(path)}"


def _choice(given: str, choices: Sequence[str], value: str | None = None) -> str:
    word = value if value is not None else given
    shown = f"{_shown(given)}: " if given else ""
    return f"{shown}this must be one of {', '.join(choices)}{nearest(word, choices)}"


def _shown(value: Any) -> str:
    text = short(value) if isinstance(value, (str, int, float, bool, type(None))) else "a section or list"
    return text if len(text) <= 60 else text[:57] + "..."


def _example(path: KeyPath) -> str:
    entries = find(path)
    if not entries:
        return "see `megacpt config explain`"
    key = entries[0]
    if key.examples:
        return f"write for example `{key.name}: {example_text(key.examples[0])}`"
    if key.choices:
        return f"write one of {', '.join(key.choices)}"
    return f"`megacpt config explain {key.path}` tells what belongs there"


def example_text(value: Any) -> str:
    """An example as it would stand in a file; examples given as text are shown as they are."""
    return value if isinstance(value, str) else short(value)


def unknown_key(path: KeyPath) -> str:
    """Say that a key is unknown: which kinds of its section have it, or which known key is nearest."""
    entries = catalogue().get(".".join(path), ())
    owners = [kind for entry in entries for kind in entry.kinds]
    if owners:
        section = ".".join(path[:-1])
        kinds = " or ".join(owners)
        return f"this key belongs to {section}.kind {kinds}, not to the kind that is set: remove it"
    near = nearest_key(path)
    if near:
        return f"unknown key; did you mean '{near}'?"
    names = sorted({name.rpartition(".")[2] for name in catalogue() if name.rpartition(".")[0] == ".".join(path[:-1])})
    return f"unknown key; known here: {', '.join(names)}" if names else "unknown key"
