"""Schedules by name: a file of configs/schedules/ in the place of the section `schedule`, with its peak rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megacpt.config.library import schedule_path
from megacpt.config.overrides import Override
from megacpt.config.yaml_text import KeyPath, read_document
from megacpt.errors import ConfigError

PEAK = "peak_lr"
"""The one key of a schedule's file that belongs to another section, `optim`."""


def expand_schedule(data: dict[str, Any], places: dict[KeyPath, str]) -> None:
    """Put the keys of a named schedule in the place of its name, and its peak where `optim` gives none.

    Raises:
        ConfigError: there is no such schedule; names the nearest.
    """
    name = data.get("schedule")
    if not isinstance(name, str):
        return
    data["schedule"], peak = _read(name, places)
    _default_peak(data, peak, places)


def expand_overrides(data: dict[str, Any], changes: Sequence[Override], places: dict[KeyPath, str]) -> list[Override]:
    """The same for ``schedule=NAME`` on the command line; ``schedule.KEY=VALUE`` behind it changes what it names."""
    found = []
    for change in changes:
        if change.path == ("schedule",) and isinstance(change.value, str):
            section, peak = _read(change.value, places)
            _default_peak(data, peak, places)
            change = replace(change, value=section)
        found.append(change)
    return found


def _read(name: str, places: dict[KeyPath, str]) -> tuple[dict[str, Any], Any]:
    """The keys of a schedule given by name or path, and its peak rate (None without one)."""
    try:
        document = read_document(schedule_path(name))
    except ConfigError as error:
        raise ConfigError(f"schedule: {error}") from None
    places.update({("schedule", *key): place for key, place in document.places.items()})
    section = dict(document.data)
    return section, section.pop(PEAK, None)


def _default_peak(data: dict[str, Any], peak: Any, places: dict[KeyPath, str]) -> None:
    place = places.pop(("schedule", PEAK), None)
    optim = data.get("optim")
    if peak is None or not (optim is None or isinstance(optim, Mapping)) or (optim or {}).get(PEAK) is not None:
        return
    data["optim"] = {**(optim or {}), PEAK: peak}
    if place is not None:
        places[("optim", PEAK)] = place
