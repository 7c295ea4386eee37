"""The steps at which held-out streams are measured."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megacpt.evaluate.grid import Grid


def test_a_first_stage() -> None:
    assert [step for step in range(951) if step in Grid(200, 950)] == [0, 200, 400, 600, 800, 950]


def test_behind_a_boundary() -> None:
    found = [step for step in range(1101) if step in Grid(200, 1100, dense=512)]
    dense = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert found == sorted({0, *dense, 200, 400, 600, 800, 1000, 1100})


def test_the_dense_part_ends_where_it_is_told_to() -> None:
    assert [step for step in range(41) if step in Grid(30, 40, dense=7)] == [0, 1, 2, 4, 30, 40]
    assert [step for step in range(41) if step in Grid(30, 40, dense=8)] == [0, 1, 2, 4, 8, 30, 40]


@given(st.integers(1, 300), st.integers(1, 900), st.integers(0, 900))
def test_the_grid_is_its_definition(every: int, last: int, dense: int) -> None:
    powers = {1 << n for n in range(12) if 1 << n <= dense}
    expected = {0, last} | set(range(0, last + 1, every)) | powers
    grid = Grid(every, last, dense)
    assert {step for step in range(last + 1) if step in grid} == {step for step in expected if step <= last}
