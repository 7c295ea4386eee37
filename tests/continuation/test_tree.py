"""The tree of runs, as `megacpt lineage show` prints it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from megacpt.config import dump
from megacpt.continuation.boundary import annealed_config, create_run, first_ledger
from megacpt.continuation.ledger import Ledger
from megacpt.continuation.tree import find_runs, lineage_tree
from megacpt.errors import CheckpointError
from tests.continuation.conftest import Finish, stage
from tests.small import run_config


def _print(*paths: Path) -> list[str]:
    console = Console(width=300, force_terminal=False)
    with console.capture() as capture:
        console.print(lineage_tree(paths))
    return capture.get().splitlines()


def test_runs_stand_under_the_run_they_continue(
    english: Path, streams: dict[str, str], finish: Finish, tmp_path: Path
) -> None:
    replay = {"share": "25%", "policy": "seen"}
    python = finish(stage(tmp_path / "python", {"python": streams["python"]}, replay=replay), english)
    config, parent = annealed_config(python, "50%", tmp_path / "release", [])
    finish(config, parent)
    finish(run_config(tmp_path / "unrelated", {"c": streams["c"]}), steps=2)
    waiting = stage(tmp_path / "waiting", {"c": streams["c"]})
    create_run(waiting, first_ledger(waiting, english))

    lines = _print(tmp_path)
    at = {name: next(i for i, line in enumerate(lines) if f"{tmp_path / name} " in line) for name in
          ("english", "python", "release", "unrelated", "waiting")}  # fmt: skip
    depth = {name: lines[i].index("/") for name, i in at.items()}
    assert depth["english"] == depth["unrelated"]
    assert depth["python"] == depth["waiting"] > depth["english"]
    assert depth["release"] > depth["python"]
    assert at["english"] < at["python"] < at["release"] < at["waiting"] < at["unrelated"]

    assert lines[at["english"]].endswith(Ledger.read(english).id)
    about_python = [line.strip(" │├└─") for line in lines[at["python"] + 1 : at["release"]]]
    assert about_python == [
        "python (trunk): 4 of 4 steps, 512 tokens, 1,536 in all",
        "python 384 tokens (0.50 epochs), replay-english 128 tokens (0.50 epochs)",
        "infinite schedule, rate 0.0055, constant; layouts: tp1 pp1 cp1 dp1",
    ]
    text = "\n".join(lines)
    assert "python-anneal (anneal): 2 of 2 steps, 256 tokens, 1,792 in all" in text
    assert "anneal schedule, rate 0.001, done" in text
    assert "nothing read yet" in text
    assert "infinite schedule, not started; layouts: none" in text


def test_one_run_of_a_lineage_alone(english: Path, streams: dict[str, str], finish: Finish, tmp_path: Path) -> None:
    finish(stage(tmp_path / "python", {"python": streams["python"]}), english)
    assert [node.folder for node in find_runs([tmp_path / "python"])] == [tmp_path / "python"]
    assert str(tmp_path / "english") not in "\n".join(_print(tmp_path / "python"))


def test_no_run_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"no run in .*: a run folder holds start\.json"):
            find_runs([path])


def test_a_run_that_became_longer(streams: dict[str, str], finish: Finish, tmp_path: Path) -> None:
    mixture = {"english": streams["english"]}
    finish(run_config(tmp_path / "run", mixture, steps=4))
    longer = run_config(tmp_path / "run", mixture, steps=9)
    finish(longer, steps=7)
    (tmp_path / "run" / "run.yaml").write_text(dump(run_config(tmp_path / "run", mixture, steps=4)))
    assert any("first (trunk): 7 of 9 steps" in line for line in _print(tmp_path))
