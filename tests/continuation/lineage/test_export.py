"""The forest as JSON."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megacpt.continuation.ledger import LEDGER, Ledger
from megacpt.continuation.lineage.export import export
from megacpt.errors import CheckpointError
from tests.continuation.lineage import made

DOCS = Path(__file__).parents[3] / "docs/lineage.md"


def test_every_run_with_its_parent_and_what_it_read(project: Path) -> None:
    content = export([project])
    json.dumps(content)
    nodes = content["nodes"]
    names = [Path(node["folder"]).name for node in nodes]
    assert names == ["1-english", "2-seen", "3-phases", "4-fresh", "5-release", "6-reservoir", "7-power-law",
                     "8-external", "9-shorter"]  # fmt: skip
    assert [node["parent"] for node in nodes] == [None, 0, 1, 2, 3, 3, 5, 6, 7]
    assert [node["depth"] for node in nodes] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    for node in nodes:
        assert node["kind"] == "run"
        assert node["steps_planned"] == node["stage"]["steps"]
        assert node["checkpoints"][-1]["id"] == node["id"]
        assert [checkpoint["problem"] for checkpoint in node["checkpoints"]] == [None] * len(node["checkpoints"])
        if node["parent"] is not None:
            parent = nodes[node["parent"]]
            assert node["parent_id"] == parent["checkpoints"][-1]["id"]
            assert node["began_at"] == {"steps": parent["stage"]["steps"], "tokens": parent["stage"]["tokens"]}
            assert node["tokens"] == parent["tokens"] + node["stage"]["tokens"]


def test_the_streams_add_up(project: Path) -> None:
    content = export([project])
    read = [0] * len(content["nodes"])
    for stream in content["streams"]:
        for part in stream["read"]:
            read[part["node"]] += part["tokens"]
    assert read == [node["stage"]["tokens"] for node in content["nodes"]]
    (c,) = (stream for stream in content["streams"] if stream["names"] == ["c"])
    assert {(part["role"], part["policy"]) for part in c["read"]} == {
        ("new", None), ("replay", "reservoir"), ("replay", "power_law"), ("replay", "seen")}  # fmt: skip


def test_the_same_forest_gives_the_same_text(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = shutil.copytree(project, tmp_path / "copy/project")
    texts = []
    for place in (project.parent, copy.parent):
        monkeypatch.chdir(place)
        texts.append(json.dumps(export([Path("project")])))
    assert texts[0] == texts[1]


def test_missing_derived_and_damaged_ones(tmp_path: Path) -> None:
    first = made.ledger(made.stage("a"))
    second = made.ledger(made.stage("b"), first, "a")
    mean = replace(second, parent=second.id, derived={"operation": "average", "of": [second.id]})
    run = made.write(tmp_path / "b", second, steps=(2, 4))
    made.write_checkpoint(tmp_path / "mean", mean, "stage: {tokens: 512}")
    (run / "checkpoints/step-00000002" / LEDGER).write_text("{}")
    content = export([tmp_path])
    kinds = [(node["kind"], node["parent"], node["derived"] is not None) for node in content["nodes"]]
    assert kinds == [("missing", None, False), ("run", 0, False), ("checkpoint", 1, True)]
    missing, found = content["nodes"][:2]
    assert (missing["folder"], missing["id"], missing["model"], missing["stage"]["name"]) == (None, None, None, "a")
    assert [(c["step"], c["id"]) for c in found["checkpoints"]] == [(2, None), (4, second.id)]
    assert [part["node"] for stream in content["streams"] for part in stream["read"]] == [0, 1]
    newest = run / "checkpoints/step-00000004" / LEDGER
    newest.write_text("{}")
    assert str(newest) in export([tmp_path])["problems"][0]


def test_every_key_is_in_the_docs(project: Path) -> None:
    content = export([project])
    told = set(re.findall(r"`([a-z_]+)`", DOCS.read_text()))
    keys = set(content)
    for part in ("nodes", "streams"):
        keys |= {key for entry in content[part] for key in entry}
    keys |= {key for node in content["nodes"] for checkpoint in node["checkpoints"] for key in checkpoint}
    keys |= {key for stream in content["streams"] for part in stream["read"] for key in part}
    keys |= {key for node in content["nodes"] for key in node["stage"]}
    assert keys - told == set()


def test_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no run in"):
        export([tmp_path])
    made.write(tmp_path / "a", made.ledger(made.stage("a")))
    assert Ledger.read(tmp_path / "a/checkpoints/step-00000004").id == export([tmp_path])["nodes"][0]["id"]
