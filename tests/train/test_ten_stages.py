"""A year in small: ten stages, each another operation, two kills; and every token of it proven from the streams."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.command import finish, launch_ranks, megacpt
from tests.small import STEP, make_streams, run_mapping

STEPS = 24
TP2 = {"tensor": 2}
DP2 = {"tensor": 1, "distributed_optimizer": True}
PP2 = {"pipeline": 2, "distributed_optimizer": False}


@dataclass(frozen=True)
class Stage:
    """A stage of the lineage.

    Attributes:
        parent: the run that it continues; None for the first stage.
        keys: the stage file.
        ranks: processes that train it.
        killed: whether all of them are killed on the way, and started again.
    """

    name: str
    parent: str | None
    keys: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    killed: bool = False


def _stage(name: str, mixture: dict[str, Any], share: str = "25%", policy: str = "seen", **keys: Any) -> dict[str, Any]:
    replay = {"share": share, "policy": policy, **keys.pop("replay", {})}
    return {"name": name, "tokens": STEPS * STEP, "mixture": mixture, "replay": replay, **keys}


def lineage(streams: dict[str, str]) -> list[Stage]:
    """Ten stages; the layout changes at three boundaries (4, 6 and 8), and two stages are killed."""
    english, python, c = (streams[name] for name in ("english", "python", "c"))
    held_out = {name: streams[f"{name}-valid"] for name in ("english", "python", "c")}
    measured = {"every": "8 steps", "dense": "4 steps", "tokens": 256, "streams": held_out}
    base = {
        **run_mapping("runs/1", {"english": english}, STEPS),
        "evaluate": measured,
        "checkpoint": {"every": "6 steps", "keep_last": None},
    }
    base["stage"] = {"name": "1", "tokens": STEPS * STEP, "mixture": {"english": english}}
    weights = [{"after": "50%", "weights": {"english": 1, "python": 3}, "ramp": "20%"}]
    proxy = {"streams": {"wild": {"path": python}}}
    return [
        Stage("1", None, base),
        Stage("2", "1", {"stage": _stage("2", {"python": python})}),
        Stage("3", "2", {"stage": _stage("3", {"english": english, "python": python}, "0%", phases=weights)}, 1, True),
        Stage("4", "3", {"stage": _stage("4", {"c": c}, policy="fresh"), "parallel": TP2}, 2),
        Stage("5-release", "4", {"stage": _stage("5", {"c": c}, kind="anneal"), "schedule": {"kind": "anneal"}}, 2),
        Stage(
            "6",
            "4",
            {
                "stage": _stage("6", {"c": c}, policy="reservoir", replay={"size": 40 * 16}),
                "parallel": DP2,
            },
            2,
            True,
        ),
        Stage(
            "7",
            "6",
            {
                "stage": _stage(
                    "7", {"english": {"path": english, "epochs": 2}}, policy="power_law", carry={"second_moment": 0.5}
                )
            },
            2,
        ),
        Stage(
            "8",
            "7",
            {
                "stage": _stage("8", {"c": c}, "10%", "external", replay=proxy),
                "model": {"rope": {"base": 100000.0}, "max_seq_length": 128},
                "batch": {"seq_length": 32, "sequences": 4},
                "parallel": PP2,
                "schedule": {"kind": "rewarmed_cosine", "warmup": "4 steps"},
            },
            2,
        ),
        Stage("9", "8", {"stage": _stage("9", {"python": python}), "optim": {"freeze": ["embeddings"]}}, 2),
        Stage("10", "9", {"stage": _stage("10", {"c": c}, kind="anneal"), "schedule": {"kind": "anneal"}}, 2),
    ]


def train(stage: Stage, folder: Path, kill: bool) -> None:
    """Train one stage with the command line, as a user would; with `kill`, kill all of its ranks half-way."""
    file = folder / f"{stage.name}.yaml"
    file.write_text(yaml.safe_dump(stage.keys))
    run = folder / "runs" / stage.name
    command = ["train", file]
    if stage.parent is not None:
        command = ["continue", folder / "runs" / stage.parent, file, "--run", run]
    if kill:
        _kill_half_way(command, stage, folder, run)
    processes = launch_ranks(*command, folder=folder, ranks=stage.ranks)
    results = [finish(process, folder) for process in processes]
    assert [result.status for result in results] == [0] * stage.ranks, results[0].err


def _kill_half_way(command: Sequence[str | Path], stage: Stage, folder: Path, run: Path) -> None:
    processes = launch_ranks(*command, folder=folder, ranks=stage.ranks)
    while _lines(run) < STEPS // 2:
        assert all(process.is_alive() for process in processes), (folder / ".err").read_text()
        time.sleep(0.002)
    for process in processes:
        os.kill(process.pid or 0, signal.SIGKILL)
    for process in processes:
        process.join(20)
    assert _newest(run).name < f"step-{STEPS:08d}"


def _lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count('"train"') if metrics.is_file() else 0


def _newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def _tensors(run: Path) -> dict[str, str]:
    files = json.loads((_newest(run) / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".distcp")}


@pytest.mark.timeout(1500)
def test_ten_stages_with_kills_end_bitwise_like_ten_without(tmp_path: Path) -> None:
    stages = lineage(make_streams(tmp_path / "data"))
    assert len(stages) == 10
    ends = {}
    for name, kills in (("whole", False), ("killed", True)):
        folder = tmp_path / name
        folder.mkdir()
        for stage in stages:
            train(stage, folder, kills and stage.killed)
        ends[name] = {stage.name: _tensors(folder / "runs" / stage.name) for stage in stages}
    assert all(ends["whole"].values())
    assert ends["whole"] == ends["killed"]

    proof = megacpt("lineage", "verify", "runs", folder=tmp_path / "killed")
    assert proof.status == 0, proof.out + proof.err
    exported = megacpt("lineage", "export", "runs", folder=tmp_path / "killed")
    assert exported.status == 0, exported.err
