"""Placeholders in a recipe: ``$name`` stands for a value, ``for`` for all combinations of values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from megacpt.config.yaml_text import parse_value, short
from megacpt.errors import ConfigError, nearest

Values = Mapping[str, Any]
Grid = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]


def combinations(grid: Grid | None) -> list[dict[str, Any]]:
    """Return the values of each turn: all combinations of a mapping of lists, or a list of mappings as it is."""
    if grid is None:
        return [{}]
    if isinstance(grid, Mapping):
        return [dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*grid.values())]
    return [dict(values) for values in grid]


def fill(value: Any, values: Values) -> Any:
    """Return `value` with every placeholder filled in, in keys too.

    Text that held a placeholder is read again as YAML, so that ``$share%`` can become a share and ``$peak`` a number.

    Raises:
        ConfigError: for a placeholder that has no value.
    """
    if isinstance(value, Mapping):
        return {fill_text(str(key), values): fill(inner, values) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [fill(inner, values) for inner in value]
    if isinstance(value, str) and "$" in value:
        return parse_value(fill_text(value, values))
    return value


def fill_text(text: str, values: Values) -> str:
    """Return `text` with every placeholder filled in; errors as `fill`."""
    words = {name: value if isinstance(value, str) else short(value) for name, value in values.items()}
    try:
        return Template(text).substitute(words)
    except KeyError as error:
        name = error.args[0]
        raise ConfigError(f"'{text}': ${name} has no value{nearest(name, values)}") from None
    except ValueError as error:
        raise ConfigError(f"'{text}': {error}; write $$ for a dollar sign") from None
