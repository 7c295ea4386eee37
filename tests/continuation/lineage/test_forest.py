"""The forest of runs: parents are found by id, wherever their folders lie, and missing ones are known from children."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpt.continuation.boundary import START
from megacpt.continuation.ledger import LEDGER, Ledger
from megacpt.continuation.lineage.forest import Forest, Node, grow_forest
from megacpt.errors import CheckpointError
from tests.continuation.lineage.made import PROJECT, at, ledger, stage, write, write_checkpoint


def by_name(forest: Forest) -> dict[str, Node]:
    """The nodes by the names of their folders; missing ones as ``(stage)``."""
    return {f"({n.stage.name})" if n.folder is None else n.folder.name: n for n in forest}


def parents(forest: Forest) -> dict[str, str | None]:
    """The name of each node's parent."""
    names = {node: name for name, node in by_name(forest).items()}
    return {name: None if node.parent is None else names[node.parent] for name, node in by_name(forest).items()}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A line of three runs with a release branch of the second, whose ledgers name places that are gone."""
    first = ledger(stage("a"))
    second = ledger(stage("b"), first, "a")
    write(tmp_path / "p/a", first)
    write(tmp_path / "p/b", second)
    write(tmp_path / "p/c", ledger(stage("c"), second, "b"))
    write(tmp_path / "p/b-release", ledger(stage("b-anneal", kind="anneal"), second, "b"))
    return tmp_path / "p"


LINKS = {"a": None, "b": "a", "c": "b", "b-release": "b"}


def test_parents_are_found_though_every_path_is_stale(project: Path) -> None:
    assert not Path(PROJECT).exists()
    assert parents(grow_forest([project])) == LINKS


def test_parents_are_found_across_folders_and_new_names(project: Path, tmp_path: Path) -> None:
    (tmp_path / "archive/2024").mkdir(parents=True)
    (project / "a").rename(tmp_path / "archive/2024/first")
    (project / "b").rename(tmp_path / "elsewhere")
    found = parents(grow_forest([project, tmp_path / "archive", tmp_path / "elsewhere"]))
    assert found == {"first": None, "elsewhere": "first", "c": "elsewhere", "b-release": "elsewhere"}


def test_another_run_at_the_old_place_is_no_parent(tmp_path: Path) -> None:
    first = ledger(stage("a"))
    child = replace(ledger(stage("b"), first, "a"), parent_path=str(tmp_path / "runs/a/checkpoints/step-00000004"))
    write(tmp_path / "runs/a", ledger(stage("a", seed=6)))
    write(tmp_path / "runs/b", child)
    write(tmp_path / "runs/true", first)
    assert parents(grow_forest([tmp_path]))["b"] == "true"


def test_a_parent_that_went_on_and_dropped_the_checkpoint(tmp_path: Path) -> None:
    first = ledger(stage("a"))
    write(tmp_path / "a", at(first, 9), steps=(8, 9), planned=9)
    write(tmp_path / "b", ledger(stage("b"), first, "a"))
    found = by_name(grow_forest([tmp_path]))
    assert found["b"].parent is found["a"]
    assert found["b"].origin is not None
    assert (found["b"].origin.steps, found["a"].stage.steps) == (4, 9)


def test_a_run_without_checkpoints_is_known_from_its_children(tmp_path: Path) -> None:
    first = ledger(stage("a"))
    write(tmp_path / "a", first, steps=())
    write(tmp_path / "b", ledger(stage("b"), first, "a"))
    write(tmp_path / "c", ledger(stage("c"), at(first, 2), "a"))
    found = by_name(grow_forest([tmp_path]))
    assert (found["a"].stage.steps, found["a"].ledger.id) == (4, first.id)
    assert found["b"].parent is found["c"].parent is found["a"]


def test_the_likeliest_of_several_copies(tmp_path: Path) -> None:
    first = ledger(stage("a"))
    for place in ("here/a", "there/a"):
        write(tmp_path / place, first)
    write(tmp_path / "there/b", ledger(stage("b"), first, "a"))
    told = replace(ledger(stage("c"), first), parent_path=str(tmp_path / "here/a/checkpoints/step-00000004"))
    write(tmp_path / "there/c", told)
    nodes = {node.folder: node for node in grow_forest([tmp_path])}
    near, named = nodes[tmp_path / "there/b"].parent, nodes[tmp_path / "there/c"].parent
    assert near is nodes[tmp_path / "there/a"]
    assert named is nodes[tmp_path / "here/a"]


def test_missing_runs_stand_between(project: Path) -> None:
    shutil.rmtree(project / "b")
    forest = grow_forest([project])
    assert parents(forest) == {"a": None, "(b)": "a", "c": "(b)", "b-release": "(b)"}
    assert by_name(forest)["(b)"].stage.run == f"{PROJECT}/b"
    shutil.rmtree(project / "a")
    assert parents(grow_forest([project])) == {"(a)": None, "(b)": "(a)", "c": "(b)", "b-release": "(b)"}
    assert parents(grow_forest([project / "c"])) == {"(a)": None, "(b)": "(a)", "c": "(b)"}


def test_averaged_weights_stand_under_their_last_source(tmp_path: Path) -> None:
    first = ledger(stage("a"))
    second = ledger(stage("b"), first, "a")
    made = replace(
        at(second, 4), parent=second.id, derived={"operation": "average", "of": [at(second, 2).id, second.id]}
    )
    write(tmp_path / "a", first)
    write(tmp_path / "b", second, steps=(2, 4))
    write(tmp_path / "mean", made)
    write(tmp_path / "c", ledger(stage("c"), made, "mean"))
    links = {"a": None, "b": "a", "mean": "b", "c": "mean"}
    assert parents(grow_forest([tmp_path])) == links
    shutil.rmtree(tmp_path / "b")
    assert parents(grow_forest([tmp_path])) == {"a": None, "mean": None, "c": "mean"}
    write(tmp_path / "d", ledger(stage("d"), second, "b"))
    found = parents(grow_forest([tmp_path]))
    assert found == {"a": None, "(b)": "a", "mean": "(b)", "c": "mean", "d": "(b)"}


def test_a_mean_over_branches_is_found_by_the_checkpoint_on_disk(tmp_path: Path) -> None:
    first = ledger(stage("a"))
    one, other = (ledger(stage(name), first, "a") for name in ("b", "c"))
    both = replace(
        one, stages=(*first.stages, other.stage, one.stage), parent=one.id, derived={"of": [other.id, one.id]}
    )
    for name, found in (("a", first), ("b", one), ("c", other), ("mean", both)):
        write(tmp_path / name, found)
    assert parents(grow_forest([tmp_path])) == {"a": None, "b": "a", "c": "a", "mean": "b"}


def test_converted_weights_are_a_root(tmp_path: Path) -> None:
    nothing = stage(
        "llama", steps=0, kind="converted", plan=replace(stage("x").plan, sources=()), consumed={}, repeats={}
    )
    made = replace(ledger(nothing), derived={"operation": "from-hf", "source": "llama"})
    write_checkpoint(tmp_path / "llama", made, "")
    write(tmp_path / "b", ledger(stage("b"), made, "llama"))
    forest = grow_forest([tmp_path])
    assert parents(forest) == {"llama": None, "b": "llama"}
    assert ["run.yaml" in text for text in forest.problems] == [True]  # there was none that says a length


def test_a_checkpoint_of_a_run_given_alone(project: Path) -> None:
    checkpoint = project / "a/checkpoints/step-00000004"
    assert parents(grow_forest([checkpoint, project / "b"])) == {"step-00000004": None, "b": "step-00000004"}
    assert parents(grow_forest([checkpoint, project])) == LINKS


def test_folders_named_twice_or_linked_in_a_circle_count_once(project: Path) -> None:
    (project / "a/loop").symlink_to(project)
    (project.parent / "link").symlink_to(project)
    assert len(list(grow_forest([project, project / "b", project.parent / "link"]))) == 4


def test_a_damaged_ledger_is_named_and_an_older_one_taken(project: Path) -> None:
    first = Ledger.read(project / "a/checkpoints/step-00000004")
    write_checkpoint(project / "a/checkpoints/step-00000005", at(first, 5))
    newest = project / "a/checkpoints/step-00000005" / LEDGER
    newest.write_text(newest.read_text().replace('"seed": 5', '"seed": 6'))
    (project / "c" / START).write_text("{")
    shutil.rmtree(project / "c/checkpoints")
    forest = grow_forest([project])
    assert parents(forest) == {"a": None, "b": "a", "b-release": "b"}
    assert [text.split(" ")[0] for text in forest.problems[:1]] == [str(newest)]
    with pytest.raises(CheckpointError, match=rf"{newest} was changed[\s\S]*{project / 'c' / START} is no ledger"):
        forest.complain()


def test_no_run_is_an_error(tmp_path: Path, project: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"there is no run in .*empty: a run folder holds start\.json"):
        grow_forest([project, tmp_path / "empty"])
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        grow_forest([project, tmp_path / "nowhere"])


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int | None, int]]:
    """For each run which run it began on (None: new weights), and at which of the steps 1 to 4 of that."""
    size = draw(st.integers(1, 9))
    return [
        (None if number == 0 else draw(st.none() | st.integers(0, number - 1)), draw(st.integers(1, 4)))
        for number in range(size)
    ]


@given(histories(), st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_history_is_found_again_in_any_folders(history: list[tuple[int | None, int]], data: st.DataObject) -> None:
    ledgers: list[Ledger] = []
    for number, (parent, step) in enumerate(history):
        before = None if parent is None else at(ledgers[parent], step)
        ledgers.append(ledger(stage("ab"[number % 2], seed=number), before, f"s{parent}"))
    kept = data.draw(st.sets(st.integers(0, len(history) - 1), min_size=1))
    depth = {number: data.draw(st.sampled_from(["", "x/", "x/y/"])) for number in kept}
    with tempfile.TemporaryDirectory() as name:
        for number in kept:
            left = data.draw(st.sets(st.integers(1, 3)))
            write(Path(name) / f"{depth[number]}s{number}", ledgers[number], steps=(*sorted(left), 4))
        forest = grow_forest([Path(name)])
        seeds = [node.stage.seed for node in forest]
        assert len(seeds) == len(set(seeds))
        for number in kept:
            node: Node | None = next(node for node in forest if node.stage.seed == number)
            at_number: int | None = number
            while at_number is not None:
                assert node is not None
                assert node.stage.seed == at_number
                assert (node.folder is not None) == (at_number in kept)
                at_number, node = history[at_number][0], node.parent
            assert node is None
