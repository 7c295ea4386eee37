"""`megacpt lineage`: what it prints, and how it ends."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megacpt.continuation.ledger import LEDGER, Ledger
from tests.cli.command import Result, megacpt
from tests.continuation.conftest import finish_run, stage
from tests.small import make_streams, run_config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that have moved since: ``runs`` and ``data``."""
    place = tmp_path_factory.mktemp("place") / "before"
    streams = make_streams(place / "data")
    english = finish_run(run_config(place / "runs/english", {"english": streams["english"]}, steps=4))
    replay = {"share": "25%"}
    finish_run(stage(place / "runs/python", {"python": streams["python"]}, replay=replay), english)
    return place.rename(place.with_name("after"))


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "place"))


def lineage(folder: Path, *arguments: str | Path, status: int = 0) -> Result:
    """Run ``megacpt lineage ARGUMENTS``, which has to end with `status` and without a traceback."""
    found = megacpt("lineage", *arguments, folder=folder)
    assert found.status == status, found.err
    assert "Traceback" not in found.err
    return found


def test_show(place: Path) -> None:
    lines = lineage(place, "show", "runs").out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("●")] == ["● runs/english", "● runs/python"]
    assert "│ first (trunk): 4 of 4 steps, 512 tokens, 512 in all" in lines
    brief = lineage(place, "show", "runs", "--brief").out.splitlines()
    assert [line.split()[:2] for line in brief[1:]] == [["●", "english"], ["●", "python"]]
    assert brief[2].endswith("complete  python 75%, replay 25%")


def test_show_tells_what_it_cannot_read(place: Path) -> None:
    ledger = place / "runs/python/checkpoints/step-00000004" / LEDGER
    ledger.write_text("{}")
    found = lineage(place, "show", "runs", status=2)
    assert "○ runs/python" in found.out
    assert f"{ledger.relative_to(place)} is no ledger" in found.err
    assert "there is no folder nowhere" in lineage(place, "show", "nowhere", status=2).err


def test_diff(place: Path) -> None:
    found = lineage(place, "diff", "runs/english", "runs/python", "--json", "diff.json")
    assert "B descends from A (step 4 of first, 512 tokens)" in found.out
    content = json.loads((place / "diff.json").read_text())
    assert content["relation"] == "a before b"
    assert {row["name"]: (row["a"], row["b"], row["b_replayed"]) for row in content["streams"]} == {
        "english": (512, 640, 128),
        "python": (0, 384, 0),
    }
    assert "nowhere does not exist" in lineage(place, "diff", "runs/english", "nowhere", status=2).err


def test_verify(place: Path) -> None:
    lines = lineage(place, "verify", ".").out.splitlines()
    assert [line.split()[:3] for line in lines] == [["proven", "4", "ledgers:"], ["proven", "2", "streams:"],
                                                    ["proven", "2", "stages:"]]  # fmt: skip
    assert "computed from the shares" in lineage(place, "verify", "runs", "--quick", "--data", "data").out
    lost = lineage(place, "verify", "runs", "--quick", status=2)
    assert "the stream english (content hash " in lost.err

    path = place / "runs/python/checkpoints/step-00000004" / LEDGER
    ledger = Ledger.read_file(path)
    path.write_text(ledger.with_stage(consumed={"python": 400, "replay-english": 112}).to_json())
    found = lineage(place, "verify", ".", status=2)
    assert "claims 400 tokens of python, and its samples have 384" in found.err
    assert "proven" in found.out


def test_export(place: Path) -> None:
    printed = json.loads(lineage(place, "export", "runs").out)
    lineage(place, "export", "runs", "--json", "lineage.json")
    assert json.loads((place / "lineage.json").read_text()) == printed
    assert [(node["folder"], node["parent"]) for node in printed["nodes"]] == [
        ("runs/english", None),
        ("runs/python", 0),
    ]
    path = place / "runs/python/start.json"
    path.write_text(replace(Ledger.read_file(path), parent="0" * 12).to_json())
    shutil.rmtree(place / "runs/python/checkpoints")
    lost = json.loads(lineage(place, "export", "runs").out)["nodes"]
    assert [(node["kind"], node["parent"]) for node in lost] == [("run", None), ("missing", 0), ("run", 1)]
