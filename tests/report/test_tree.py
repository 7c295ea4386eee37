from __future__ import annotations

import shutil
from pathlib import Path

from megacpt.report.lineage import cut, run_folders
from megacpt.report.record import load_run
from megacpt.report.tree import Node, grow, short, tree_list
from tests.report.lab import Lab, save

CURVES = {"english": (8.0, 2.0), "python": (5.0, 4.0)}


def shape(nodes: list[Node]) -> list[object]:
    return [[node.stage.name, *shape(node.children)] for node in nodes]


def test_branches_grow_from_the_stage_that_they_continue(family: dict[str, Path]) -> None:
    records = {name: load_run(folder) for name, folder in family.items()}
    roots = grow(list(records.values()), [records[name] for name in ("english", "python-0", "python-0-release")])
    assert shape(roots) == [["english", ["python", ["release"]], ["python", ["release"]]]]
    (english,) = roots
    assert [Path(child.folder or "").name for child in english.children] == ["python-0", "python"]  # the subject first
    assert [child.subject for child in english.children] == [True, False]
    text = tree_list(roots)
    assert text.count("<li") == text.count("</li>") == 5
    assert text.count('<li class="subject">') == 3
    assert records["python"].ledger.id in text


def test_stages_whose_runs_are_gone_are_taken_from_the_ledgers_once(lab: Lab) -> None:
    first = lab.run("first", "english", CURVES)
    second = lab.run("second", "python", CURVES, first)
    branches = [lab.run(name, "english", CURVES, second) for name in ("a", "b")]
    shutil.rmtree(first)
    shutil.rmtree(second)
    records = [load_run(folder) for folder in branches]
    roots = grow(records, records[:1])
    assert shape(roots) == [["first", ["second", ["a"], ["b"]]]]
    assert roots[0].ledger is None
    assert roots[0].subject
    assert (roots[0].children[0].start, roots[0].children[0].children[0].start) == (20 * 1024, 40 * 1024)
    assert tree_list(roots).count("run not found") == 2


def test_what_a_stage_changed_is_named(lab: Lab) -> None:
    record = load_run(lab.run("first", "english", CURVES))
    changes = {"batch.sequences": [16, 32], "optim.freeze": [None, ["embeddings", "output"]], "<b>": [{}, {"a": 1.5}]}
    stage = record.ledger.with_stage(changes=changes).stage
    text = tree_list(grow([cut(record, stage)], [record]))
    expected = "changed batch.sequences: 16 → 32; optim.freeze: none → embeddings, output; &lt;b&gt;: none → a 1.5"
    assert expected in text


def test_long_values_are_shortened() -> None:
    assert short("x" * 40) == "x" * 40
    assert short("x" * 41) == "x" * 39 + "…"
    assert short([0.25, None, "a"]) == "0.25, none, a"


def test_a_folder_of_runs_stands_for_them(lab: Lab) -> None:
    runs = [lab.run(name, "english", CURVES) for name in ("a", "b")]
    save(runs[0], load_run(runs[0]).ledger, 12)
    assert run_folders([lab.folder / "runs"]) == runs
    assert run_folders([runs[1], lab.folder / "nothing"]) == [runs[1], lab.folder / "nothing"]
