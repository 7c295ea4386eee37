"""Run folders as training leaves them, with made-up losses on real plans, schedules and ledgers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megacpt.config import RunConfig, run_from_mapping
from megacpt.continuation.boundary import create_run, first_ledger
from megacpt.continuation.ledger import LEDGER, Ledger
from megacpt.data.plan import Phase
from megacpt.data.prepare import prepare
from megacpt.optim.schedules import schedule_from_dict

STEP = 16 * 64  # tokens of an optimizer step
Curves = Mapping[str, tuple[float, float]]
"""By held-out stream: bits a byte at the start and at the end of a stage."""


class Lab:
    """Makes runs in a folder.

    Args:
        folder: where streams and runs go.
        documents: length of each stream, in documents of some 50 bytes.
    """

    def __init__(self, folder: Path, documents: int = 40) -> None:
        self.folder = folder
        for name in ("english", "python", "c"):
            source = folder / f"{name}.jsonl"
            lines = (json.dumps({"text": f"{name} document number {i}, which is short."}) for i in range(documents))
            source.write_text("".join(f"{line}\n" for line in lines))
            prepare([source], "bytes", folder / name, workers=1, progress=False)

    def run(
        self,
        name: str,
        stream: str,
        curves: Curves,
        parent: Path | None = None,
        steps: int = 20,
        stopped_at: int | None = None,
        bumps: Curves | None = None,
        phases: Sequence[Phase] = (),
        **keys: Any,
    ) -> Path:
        """Make a run folder of one stage on `stream`, as it is after `stopped_at` of its steps, and return it.

        `parent` is a checkpoint or a run folder; `bumps` are the height and width in steps of transient rises after
        the boundary, which is then measured at steps 1, 2, 4, ... too; `phases` are those of the plan; further keys
        are those of the stage, and `schedule`.
        """
        folder = self.folder / "runs" / name
        config = self._config(folder, name, stream, steps, dict(keys))
        checkpoint = None if parent is None else parent if (parent / LEDGER).is_file() else newest(parent)
        start = first_ledger(config, checkpoint)
        start = start.with_stage(plan=replace(start.stage.plan, phases=tuple(phases)))
        create_run(config, start)
        done = steps if stopped_at is None else stopped_at
        lines = [
            *_eval_lines(start, curves, steps, done, bumps or {}),
            *_train_lines(config, start, curves[stream], steps, done),
        ]
        write_metrics(folder, sorted(lines, key=lambda line: line["step"]))
        if done:
            save(folder, start, done)
        return folder

    def _config(self, folder: Path, name: str, stream: str, steps: int, keys: dict[str, Any]) -> RunConfig:
        stage = {"kind": "trunk", "replay": {"share": keys.pop("replay", 0)}} | keys.pop("stage", {})
        return run_from_mapping(
            {
                "run": str(folder),
                "model": {"layers": 2, "hidden": 64, "ffn": 128, "heads": 2, "max_seq_length": 64},
                "tokenizer": "bytes",
                "stage": {
                    "name": name,
                    "tokens": steps * STEP,
                    "mixture": {stream: str(self.folder / stream)},
                    **stage,
                },
                "optim": {"peak_lr": 1e-3},
                "batch": {"sequences": 16, "seq_length": 64},
                **keys,
            }
        )


def lineage(lab: Lab, replay: float = 0.25) -> dict[str, Path]:
    """English, then Python with and without replay, each with a release branch."""
    before, after = {"python": (5.2, 4.4), "c": (5.6, 4.8)}, {"c": (4.8, 4.1)}
    runs = {"english": lab.run("english", "english", {"english": (8.1, 2.3), **before})}
    for name, share, lost in (("python", replay, 2.42), ("python-0", 0.0, 2.91)):
        curves = {"english": (2.3, lost), "python": (4.4, 1.95 + 0.1 * share), **after}
        runs[name] = lab.run(name, "python", curves, runs["english"], replay=share, stage={"name": "python"})
        curves = {"english": (lost, lost - 0.06), "python": (curves["python"][1], 1.84), "c": (4.1, 4.0)}
        runs[f"{name}-release"] = lab.run(
            f"{name}-release",
            "python",
            curves,
            runs[name],
            steps=5,
            stage={"name": "release", "kind": "anneal"},
            schedule={"kind": "anneal"},
            replay=share,
        )
    return runs


def saga(lab: Lab) -> dict[str, Path]:
    """Five stages with gaps after the boundaries, a mixture that changes, and branches, as of a year of training."""
    text, code, c = "english", "python", "c"
    runs = {text: lab.run(text, text, {text: (8.1, 2.3), code: (5.2, 4.4), c: (5.6, 4.8)}, steps=400)}
    phases = (Phase(1600, (0.5, 0.5), 1600), Phase(4800, (0.9, 0.1)))
    for name, share, lost, high in (("python", 0.25, 2.36, 0.25), ("python-0", 0.0, 2.71, 0.6)):
        curves = {text: (2.3, lost), code: (4.4, 1.95 + 0.1 * share), c: (4.8, 4.1)}
        bumps, more = {text: (high, 12.0)}, {"phases": phases if share else ()}
        stage = {"name": "python"}
        runs[name] = lab.run(name, code, curves, runs[text], 400, bumps=bumps, stage=stage, replay=share, **more)
    after = {text: (2.36, 2.41), code: (1.975, 2.09), c: (4.1, 1.7)}
    bumps = {text: (0.12, 9.0), code: (0.35, 20.0)}
    runs[c] = lab.run(c, c, after, runs[code], 300, bumps=bumps, replay="20%", stage={"name": "c-with-a-long-name"})
    longer = {text: (2.41, 2.33), code: (2.09, 2.0), c: (1.7, 1.72)}
    bumps = {text: (0.06, 4.0), code: (0.1, 6.0), c: (0.2, 3.0)}
    runs["long"] = lab.run("long", text, longer, runs[c], 200, bumps=bumps, replay=0.5, stage={"name": "long-context"})
    final = {text: (2.33, 2.25), code: (2.0, 1.93), c: (1.72, 1.66)}
    kind = {"name": "release", "kind": "anneal"}
    more = {"schedule": {"kind": "anneal"}, "replay": 0.5}
    runs["release"] = lab.run("release", text, final, runs["long"], 60, bumps={text: (0, 1)}, stage=kind, **more)
    early = {text: (2.41, 2.36), code: (2.09, 2.03), c: (1.7, 1.6)}
    runs["c-release"] = lab.run("c-release", c, early, runs[c], 60, bumps={text: (0, 1)}, stage=kind, **more)
    return runs


def newest(run: Path) -> Path:
    """The newest checkpoint of a run."""
    return sorted((run / "checkpoints").iterdir())[-1]


def save(run: Path, start: Ledger, step: int) -> Path:
    """Write what a report reads of the checkpoint after `step`."""
    plan, tokens = start.stage.plan, step * STEP
    schedule = schedule_from_dict(start.stage.schedule)
    consumed = {source.name: round(source.weight * tokens) // 64 * 64 for source in plan.sources}
    ledger = start.with_stage(
        tokens=tokens,
        steps=step,
        consumed=consumed,
        repeats={name: count / 2000 for name, count in consumed.items()},
        rate=schedule.rate(tokens, None, start.stage.entry_rate),
        phase=schedule.phase(tokens, None, start.stage.entry_rate),
        layouts=("TP1 PP1 CP1 DP1",),
        seconds=3.2 * step,
    )
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / LEDGER).write_text(ledger.to_json())
    (folder / "run.yaml").write_text((run / "run.yaml").read_text())
    return folder


def write_metrics(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _eval_lines(start: Ledger, curves: Curves, steps: int, done: int, bumps: Curves) -> list[dict[str, Any]]:
    every = max(steps // 10, 1)
    return [
        _line("eval", step, start, stream=name, loss=value * math.log(2), bits_per_byte=value)
        for step in range(0, done + 1)
        if step % every == 0 or step == done or (bumps and step.bit_count() == 1)
        for name, (first, last) in curves.items()
        for value in [last + (first - last) * _left(step / steps) + _bump(step, *bumps.get(name, (0.0, 1.0)))]
    ]


def _bump(step: int, height: float, width: float) -> float:
    """A quick rise to `height` at step `width`, and a slow fall."""
    return height * step / width * math.exp(1 - step / width)


def _train_lines(
    config: RunConfig, start: Ledger, curve: tuple[float, float], steps: int, done: int
) -> list[dict[str, Any]]:
    noise, schedule = random.Random(config.stage.name), schedule_from_dict(start.stage.schedule)
    first, last = curve
    return [
        _line(
            "train",
            step,
            start,
            loss=math.log(2) * (last + (first - last) * _left(step / steps)) + noise.gauss(0, 0.08),
            rate=schedule.rate(step * STEP, None, start.stage.entry_rate),
            grad_norm=0.8,
            tokens_per_second=20_000.0 + step,
            skipped=False,
            seconds=3.2 * step,
        )
        for step in range(1, done + 1)
    ]


def _line(kind: str, step: int, start: Ledger, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, "tokens": step * STEP, "lineage_tokens": start.tokens + step * STEP, **values}


def _left(progress: float) -> float:
    """What is left of a drop: quick at first, then slow; all at 0 and nothing at 1."""
    return (math.exp(-6 * progress) - math.exp(-6)) / (1 - math.exp(-6))
