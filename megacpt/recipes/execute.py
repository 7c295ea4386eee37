"""The runs of a recipe: each trained unless it is done, resumed where it stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacpt.checkpoint.store import Store, checkpoints, find_checkpoint
from megacpt.config import RunConfig, dump, load_run, overlay, run_from_mapping
from megacpt.config.overrides import merge
from megacpt.continuation.boundary import RUN, annealed_config, started
from megacpt.continuation.ledger import Ledger
from megacpt.continuation.opened import open_model
from megacpt.convert.average import average, exponential, last_checkpoints, uniform
from megacpt.convert.round_to_nearest import round_to_nearest
from megacpt.data.files import write_bytes, write_json
from megacpt.data.stream import TokenStream
from megacpt.errors import ConfigError
from megacpt.evaluate.loss import evaluate_stream
from megacpt.recipes.recipe import Recipe, RecipeRun
from megacpt.recipes.texts import prepare_texts
from megacpt.train.run import train

FIRST_SEED = 1001
METRICS = "metrics.jsonl"
_PLAN = "recipe.json"
_TIMES = "seconds.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Executed:
    """The runs of a recipe, all of them done.

    Attributes:
        seeds: the seed of each repetition.
        folders: run folders by name, a mapping for each seed.
        seconds: wall time by run, a mapping for each seed.
    """

    seeds: list[int]
    folders: list[dict[str, Path]]
    seconds: list[dict[str, float]]


def execute(recipe: Recipe, out: Path, seeds: int, say: Say) -> Executed | None:
    """Train the runs of a recipe for every seed, and skip what is done.

    Args:
        recipe: what to run.
        out: folder for texts, streams and runs.
        seeds: how many times, each with other weights and another order of the data.
        say: told before each run.

    Returns:
        Where the runs are; None if the work was asked to stop, and goes on when it is called again.

    Raises:
        ConfigError: `out` holds the runs of other settings.
    """
    _claim(out, recipe)
    say("writing and tokenising the texts")
    streams = prepare_texts(recipe.texts, out)
    found = Executed([FIRST_SEED + k for k in range(seeds)], [], [])
    for number, seed in enumerate(found.seeds):
        folder = out / f"seed-{seed}"
        folders = {run.name: folder / run.name for run in recipe.runs}
        seconds = _read_times(folder)
        for position, run in enumerate(recipe.runs):
            place = number * len(recipe.runs) + position + 1
            say(f"[{place}/{seeds * len(recipe.runs)}] seed {seed}: {run.name}")
            begun = time.perf_counter()
            done = (
                _trained(_config(recipe, run, folders, streams, seed), run, folders)
                if run.trained
                else _derived(run, folders)
            )
            if done is not None:
                seconds[run.name] = seconds.get(run.name, 0.0) + time.perf_counter() - begun
                write_json(folder / _TIMES, seconds)
            if done is False:
                return None
        found.folders.append(folders)
        found.seconds.append(seconds)
    return found


def _claim(out: Path, recipe: Recipe) -> None:
    """Refuse a folder that holds the same runs with other settings; say in it whose it is and what it holds."""
    path, plan = out / _PLAN, json.loads(json.dumps(recipe.training))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        known, runs = ({run["name"]: run for run in content.get("runs", [])} for content in (before, plan))
        plan["runs"] = list({**known, **runs}.values())
        other = [key for key in plan if key != "runs" and before.get(key) != plan[key]]
        other += ["runs"] if any(known.get(name, run) != run for name, run in runs.items()) else []
        if other:
            raise ConfigError(
                f"{out} holds runs of the recipe {before.get('name')} with other settings ({', '.join(other)} differ): "
                "give another folder with --out, or remove this one"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)


def _config(
    recipe: Recipe, run: RecipeRun, folders: Mapping[str, Path], streams: Mapping[str, Path], seed: int
) -> RunConfig:
    """Return the configuration of a run that is trained."""
    folder = folders[run.name]
    if run.anneal is not None:
        return annealed_config(_parent(run, folders), str(run.anneal), folder, [])[0]
    keys = _with_streams(run.keys, streams)
    if run.source is not None:
        return overlay(load_run(_parent(run, folders) / RUN), keys, run=folder)
    held_out = {name: str(path.resolve()) for name, path in streams.items() if name.endswith("-valid")}
    measured = {"evaluate": {"streams": {name.removesuffix("-valid"): path for name, path in held_out.items()}}}
    data = merge(merge(recipe.base, measured), keys)
    return run_from_mapping({**data, "run": str(folder), "seed": seed}, source=f"the recipe {recipe.name}")


def _with_streams(keys: Mapping[str, Any], streams: Mapping[str, Path]) -> dict[str, Any]:
    """Put the folders of streams in the place of their names in a stage's mixture."""
    found = dict(keys)
    stage = dict(found.get("stage") or {})
    if isinstance(stage.get("mixture"), Mapping):
        stage["mixture"] = {
            name: {**({"path": entry} if isinstance(entry, str) else entry)} for name, entry in stage["mixture"].items()
        }
        for entry in stage["mixture"].values():
            if entry.get("path") in streams:
                entry["path"] = str(streams[entry["path"]].resolve())
        found["stage"] = stage
    return found


def _parent(run: RecipeRun, folders: Mapping[str, Path]) -> Path:
    """Return the checkpoint that a run starts from."""
    assert run.source is not None
    source = folders[run.source]
    if run.at is None:
        return find_checkpoint(source)
    config = load_run(source / RUN)
    step = run.at.steps(config.stage.tokens, config.tokens_per_step)
    return find_checkpoint(Store(source).path(step))


def _trained(config: RunConfig, run: RecipeRun, folders: Mapping[str, Path]) -> bool | None:
    """Train a run to its end: None if it had been, False if it was asked to stop."""
    if _complete(config):
        return None
    return train(config, None if run.source is None else _parent(run, folders)).complete


def _complete(config: RunConfig) -> bool:
    """Whether the run is there, with these settings and at its end."""
    found = checkpoints(config.run)
    if not found or (found[-1] / RUN).read_text(encoding="utf-8") != dump(config):
        return False
    return Ledger.read(found[-1]).stage.steps >= config.stage_steps


def _derived(run: RecipeRun, folders: Mapping[str, Path]) -> bool | None:
    """Average the last checkpoints of a run, or round its last one, and measure that: None if it is done."""
    assert run.source is not None
    folder, source = folders[run.name], folders[run.source]
    if (folder / METRICS).is_file():
        return None
    if started(folder) is None and run.average is not None:
        count, ema = run.average.last, run.average.ema
        average(last_checkpoints(source, count), folder, uniform(count) if ema is None else exponential(count, ema))
    elif started(folder) is None and run.rounding is not None:
        round_to_nearest(_parent(run, folders), folder, run.rounding.bits, run.rounding.group)
    engine, tokenizer, config = open_model(folder)
    step = Ledger.read(find_checkpoint(folder)).stage.steps
    lines = []
    for name, path in config.evaluate.streams.items():
        stream = TokenStream.open(path, tokenizer=tokenizer)
        length = config.evaluate.seq_length or config.batch.seq_length
        loss = evaluate_stream(engine, name, stream, length, config.evaluate.tokens, config.batch.microbatch)
        if not math.isfinite(loss.loss):
            raise ConfigError(f"{run.name}, made of {source}, has no finite loss on {name}")
        lines.append({"kind": "eval", "step": step, "stream": name, "bits_per_byte": loss.bits_per_byte})
    write_bytes(folder / METRICS, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    return True


def _read_times(folder: Path) -> dict[str, float]:
    path = folder / _TIMES
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
