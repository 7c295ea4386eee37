from __future__ import annotations

import os
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from megacpt.errors import CheckpointError
from megacpt.report.lineage import chain, lines, with_ancestors
from megacpt.report.record import RunRecord, load_run
from tests.report.lab import STEP, Lab, save

CURVES = {"english": (8.0, 2.0), "python": (5.0, 4.0)}
Family = dict[str, Path]


def names(line: list[RunRecord]) -> list[str]:
    return [record.folder.name for record in line]


@pytest.mark.parametrize("seed", range(4))
def test_runs_are_ordered_by_ancestry(seed: int, family: Family) -> None:
    folders = [family[name] for name in ("english", "python", "python-release")]
    random.Random(seed).shuffle(folders)
    line = chain(folders)
    assert names(line) == ["english", "python", "python-release"]
    assert [(a.end, b.start) for a, b in pairwise(line)] == [(20 * STEP,) * 2, (40 * STEP,) * 2]


def test_a_run_that_is_given_twice_counts_once(family: Family) -> None:
    folder = family["english"]
    assert names(chain([folder, folder / ".." / folder.name, Path(os.path.relpath(folder))])) == ["english"]


def test_branches_are_no_chain(family: Family) -> None:
    with pytest.raises(CheckpointError, match=r"2 ends, .*/python, .*/python-0"):
        chain([family["english"], family["python"], family["python-0"]])


def test_branches_are_lines_of_their_own(family: Family) -> None:
    found = lines([load_run(folder) for folder in family.values()])
    assert [names(line) for line in found] == [
        ["english", "python", "python-release"],
        ["english", "python-0", "python-0-release"],
    ]


def test_a_run_between_may_be_missing(family: Family) -> None:
    assert names(chain([family["python-release"], family["english"]])) == ["english", "python-release"]


def test_strangers_are_no_chain(lab: Lab) -> None:
    runs = [lab.run("a", "english", CURVES), lab.run("b", "python", CURVES)]
    with pytest.raises(CheckpointError, match="not one line of descent"):
        chain(runs)


def test_ancestors_are_found(family: Family) -> None:
    found = with_ancestors([family["python-release"], family["python-0"]])
    assert [folder.name for folder in found] == ["english", "python", "python-release", "python-0"]


def test_ancestors_that_are_gone_are_left_out(lab: Lab) -> None:
    first = lab.run("first", "english", CURVES)
    second = lab.run("second", "python", CURVES, first)
    shutil.rmtree(first)
    assert names(chain(with_ancestors([second]))) == ["second"]


def test_runs_that_were_moved_still_belong_together(lab: Lab, tmp_path: Path) -> None:
    first = lab.run("first", "english", CURVES)
    second = lab.run("second", "python", CURVES, first)
    moved = [run.rename(tmp_path / f"moved-{run.name}") for run in (second, first)]
    assert names(chain(moved)) == ["moved-first", "moved-second"]


def test_of_two_equal_parents_the_one_at_its_place_counts(lab: Lab) -> None:
    first = lab.run("first", "english", CURVES)
    second = lab.run("second", "python", CURVES, first)
    copy = shutil.copytree(first, first.parent / "copy")
    found = lines([load_run(folder) for folder in (copy, first, second)])
    assert [names(line) for line in found] == [["copy"], ["first", "second"]]


def test_a_parent_that_went_on_is_cut_at_the_branch(lab: Lab) -> None:
    first = lab.run("first", "english", CURVES, steps=20)
    early = save(first, load_run(first).ledger, 8)
    second = lab.run("second", "python", CURVES, early, steps=10)
    line = chain([first, second])
    assert [record.end for record in line] == [8 * STEP, 18 * STEP]
    assert line[0].train[-1].tokens == line[0].evaluations["english"][-1].tokens == 8 * STEP
    assert line[0].ledger.stage.steps == 8
    assert load_run(first).end == 20 * STEP
