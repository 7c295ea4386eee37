"""From files and overrides to a checked `RunConfig`, and back to YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megacpt.config.base import Problem, Section
from megacpt.config.fixed import model_problems
from megacpt.config.keys import is_section
from megacpt.config.library import model_path
from megacpt.config.model import ModelConfig
from megacpt.config.overrides import (
    apply_overrides,
    mark_changed,
    merge,
    named_model,
    parse_overrides,
)
from megacpt.config.presets import expand_overrides, expand_schedule
from megacpt.config.problems import problems_of
from megacpt.config.run import RunConfig
from megacpt.config.yaml_text import Document, KeyPath, read_document, write_yaml
from megacpt.errors import ConfigError


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply ``KEY=VALUE`` overrides and check it.

    Raises:
        ConfigError: the file cannot be read, or keys or values are wrong; lists all of them, with places.
    """
    document = read_document(Path(path).expanduser())
    return _build(document.data, dict(document.places), overrides, str(path))


def run_from_mapping(
    data: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "the configuration"
) -> RunConfig:
    """Check the keys of a run that are in memory already; `source` names them. Errors as `load_run`."""
    return _build(dict(data), {}, overrides, source)


def overlay(
    parent: RunConfig,
    stage_file: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    run: str | Path | None = None,
    anew: Sequence[str] = (),
) -> RunConfig:
    """Lay a stage file over the run it continues.

    Sections merge key by key, except that `stage` starts afresh, a changed `kind` drops the keys that it does
    not have, and a null in `evaluate.streams` drops a stream. The run folder is never inherited: it comes
    from `run`, an override or the stage file. Sections in `anew` are not inherited either: the stage has to give them.

    Raises:
        ConfigError: as `load_run`; also if the run folder is missing or the parent's, or the model changes.
    """
    if isinstance(stage_file, Mapping):
        document, source = Document(dict(stage_file)), "the stage"
    else:
        document, source = read_document(Path(stage_file).expanduser()), str(stage_file)
    base = {key: value for key, value in _plain(parent).items() if key not in ("run", "stage", *anew)}
    child = dict(document.data)
    places = dict(document.places)
    if isinstance(child.get("schedule"), str):
        # A named schedule replaces the parent's whole, with its peak: what the stage itself gives goes before it.
        del base["schedule"]
        expand_schedule(child, places)
    model = child.get("model")
    if isinstance(model, str):
        child["model"] = named_model(model).data
    elif isinstance(model, Mapping) and "name" not in model:
        mark_changed(base["model"])
    if run is not None:
        child["run"] = str(run)
        places["run",] = "--run"
    made = _build(merge(base, child), places, overrides, source)
    _raise(_continuation_problems(parent, made), document.places, source)
    return made


def _continuation_problems(parent: RunConfig, made: RunConfig) -> list[Problem]:
    problems = []
    if made.run.resolve() == parent.run.resolve():
        text = f"{made.run} is the folder of the run that is continued: give the new stage a folder of its own"
        problems.append(Problem("run", text))
    return [*problems, *model_problems(parent.model, made.model, made.stage.carry.upcycle)]


def load_model(model: str | Path | Mapping[str, Any]) -> ModelConfig:
    """Read a model: a name from configs/models, the path of a YAML file, or a mapping of its keys.

    Raises:
        ConfigError: unknown name, unreadable file, or wrong keys and values; all of them are listed.
    """
    if isinstance(model, Mapping):
        document, source = Document(dict(model)), "the model"
    else:
        path = model if isinstance(model, Path) else model_path(model)
        document, source = read_document(path), str(path)
        document.data.setdefault("name", path.stem)
    try:
        return ModelConfig.model_validate(_without_empty_sections(document.data, ("model",)))
    except ValidationError as error:
        places = {("model", *path): place for path, place in document.places.items()}
        _raise(problems_of(error, ("model",)), places, source)
        raise


def dump(config: Section) -> str:
    """YAML text of a configuration, every key written out; it loads back to an equal configuration."""
    return write_yaml(_plain(config))


def _plain(config: Section) -> dict[str, Any]:
    return {str(key): _plain_value(value) for key, value in config.model_dump().items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        # In a section with variants `kind` decides what the other keys mean, so it comes first.
        first = {"kind": value["kind"]} if "kind" in value and "name" not in value else {}
        return {**first, **{key: _plain_value(inner) for key, inner in value.items()}}
    return str(value) if isinstance(value, Path) else value


def _build(data: dict[str, Any], places: dict[KeyPath, str], overrides: Sequence[str], source: str) -> RunConfig:
    expand_schedule(data, places)
    changes = expand_overrides(data, parse_overrides(overrides), places)
    problems = apply_overrides(data, changes)
    places.update({change.path: "command line" for change in changes})
    _expand_model(data, places)
    data = _without_empty_sections(data, ())
    if isinstance(data.get("schedule"), dict):
        data["schedule"] = {"kind": "infinite", **data["schedule"]}
    try:
        made = RunConfig.model_validate(data)
    except ValidationError as error:
        problems += problems_of(error)
    _raise(problems, places, source)
    return made


def _expand_model(data: dict[str, Any], places: dict[KeyPath, str]) -> None:
    """Put the keys of a named model in the place of its name."""
    if isinstance(data.get("model"), str):
        document = named_model(data["model"])
        data["model"] = document.data
        places.update({("model", *key): place for key, place in document.places.items()})


def _without_empty_sections(data: Mapping[str, Any], path: KeyPath) -> dict[str, Any]:
    """Read a section all of whose keys are commented out (null in YAML) as a section without keys."""
    return {
        key: {}
        if value is None and is_section((*path, key))
        else _without_empty_sections(value, (*path, key))
        if isinstance(value, Mapping)
        else value
        for key, value in data.items()
    }


def _raise(problems: Sequence[Problem], places: Mapping[KeyPath, str], source: str) -> None:
    if not problems:
        return
    lines = [f"{_place(problem, places) or source}: {problem}" for problem in problems]
    if any(problem.text.startswith("missing") for problem in problems if problem.key in ("model", "optim", "batch")):
        lines.append("If this is a stage file: it is used with `megacpt continue CHECKPOINT STAGE.yaml --run DIR`.")
    raise ConfigError("\n".join(lines))


def _place(problem: Problem, places: Mapping[KeyPath, str]) -> str | None:
    """The place of the key of a problem, or of the innermost section around it that has one."""
    by_key = {".".join(path): place for path, place in places.items()}
    key = problem.key
    while key and key not in by_key:
        key = key.rpartition(".")[0]
    return by_key.get(key)
