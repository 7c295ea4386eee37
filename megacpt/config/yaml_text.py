"""YAML as a person means it: read with places for error messages, written so that it reads back the same.

Differences from PyYAML's defaults, which follow YAML 1.1: ``3e-4`` is a number, ``no`` and ``on`` are words
(a stream of Norwegian may be called ``no``), ``010`` is ten, ``12:30`` is text, keys are always text, and a
key that is given twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from megacpt.errors import ConfigError, nearest

KeyPath = tuple[str, ...]

_INT = re.compile(r"[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$"
    r"|\.(?:nan|NaN|NAN)$"
)
_RESOLVERS: tuple[tuple[str, re.Pattern[str], list[str]], ...] = (
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
)


@dataclass(frozen=True)
class Document:
    """A parsed YAML mapping and, for each key path in it, the place it came from (``file:line``)."""

    data: dict[str, Any]
    places: Mapping[KeyPath, str] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - the name and the kind of attribute are PyYAML's

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = True) -> dict[Any, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep) for key, value in node.value}

    def construct_map(self, node: yaml.MappingNode) -> dict[Any, Any]:
        return self.construct_mapping(node)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value.replace("_", ""))

    def construct_float(self, node: yaml.ScalarNode) -> float:
        text = node.value.replace("_", "").lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_map)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_float)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever this reader or a YAML 1.1 reader would take for something other than text."""

    def represent_number(self, value: float) -> yaml.ScalarNode:
        if value and not 1e-3 <= abs(value) < 1e16 and isfinite(value):
            mantissa, exponent = _scientific(value)
            mantissa += "" if "." in mantissa else ".0"
            return self.represent_scalar("tag:yaml.org,2002:float", f"{mantissa}e{int(exponent):+d}")
        return self.represent_float(value)

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _scientific(value: float) -> tuple[str, str]:
    """Split `value` into the shortest mantissa that reads back exactly, and the exponent of ten."""
    for digits in range(17):
        text = f"{value:.{digits}e}"
        if float(text) == value:
            mantissa, exponent = text.split("e")
            return mantissa, exponent
    raise AssertionError("17 digits are always enough for a double")


for _tag, _pattern, _first in _RESOLVERS:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Dumper.add_representer(float, _Dumper.represent_number)


def parse_value(text: str) -> Any:
    """Read one YAML value, such as the right side of an override; raise ConfigError where it is not YAML."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _check_nodes(node)
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"'{text}' is not valid YAML: {_explain(error)}") from None


def parse_document(text: str, source: str) -> Document:
    """Read a YAML mapping from `text`; `source` names it in messages. Raise ConfigError for anything else."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{source} is empty: it must hold keys and values, such as `tokens: 20M`")
        repeated = _check_nodes(node)
        if repeated:
            raise ConfigError("\n".join(f"{source}:{problem}" for problem in repeated))
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(f"{place}: this is not valid YAML: {_explain(error)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: this is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source} must hold keys and values, such as `tokens: 20M`, not {_kind_of(data)}")
    return Document(data, {path: f"{source}:{line}" for path, line in _lines(node)})


def read_document(path: Path) -> Document:
    """Read a YAML file; raise ConfigError with file, line and column where it cannot be read."""
    if path.is_dir():
        hint = f": did you mean {path / 'run.yaml'}?" if (path / "run.yaml").is_file() else ", not a file"
        raise ConfigError(f"{path} is a folder{hint}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        where = "" if path.parent.is_dir() else f"; its folder {path.parent} does not exist either"
        raise ConfigError(f"{path} does not exist{nearest(path.name, siblings)}{where}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return parse_document(text, str(path))


def write_yaml(data: Mapping[str, Any]) -> str:
    """Turn nested mappings of plain values into YAML text that `parse_document` reads back unchanged."""
    return yaml.dump(
        dict(data), Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=110
    )


def inline(value: Any) -> str:
    """One value as it would be written on one line of YAML."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def short(value: Any) -> str:
    """One value for a message: as `inline`, with 3e-4 rather than 3.0e-4."""
    return inline(value).replace(".0e", "e")


def _explain(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    text = " ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in text:
        text += " (indent with spaces, not tabs)"
    if "mapping values are not allowed" in text:
        text += " (put a text that contains ': ' in quotes)"
    return text


def _check_nodes(node: yaml.Node | None, active: frozenset[int] = frozenset()) -> list[str]:
    """Return ``line: problem`` for each repeated key; raise for other mistakes in keys and anchors."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return []
    if id(node) in active:
        raise yaml.constructor.ConstructorError(None, None, "an anchor contains itself", node.start_mark)
    active |= {id(node)}
    if isinstance(node, yaml.SequenceNode):
        return [problem for child in node.value for problem in _check_nodes(child, active)]
    problems, seen = [], dict[str, int]()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
        line = key.start_mark.line + 1
        if key.value in seen:
            problems.append(f"{line}: {key.value}: this key was given before, in line {seen[key.value]}: remove one")
        seen.setdefault(key.value, line)
        problems += _check_nodes(value, active)
    return problems


def _lines(node: yaml.Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            yield here, key.start_mark.line + 1
            yield from _lines(value, here)


def _kind_of(value: object) -> str:
    return {list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}.get(type(value), "a number")
