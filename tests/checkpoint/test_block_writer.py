"""Checkpoints written in blocks: whole ones whatever the ranks, and interrupted ones that go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.block_writer_cases import PIECES, journal
from tests.pool import Pools

CASES = "tests.checkpoint.block_writer_cases"


def write(pools: Pools, folder: Path, ranks: int = 1, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = pools(ranks).run(f"{CASES}:write", folder=str(folder), **{"source": "a", **options})[0]
    return found


def right(pools: Pools, folder: Path) -> bool:
    return bool(pools(1).run(f"{CASES}:right", folder=str(folder))[0])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_and_threads_write_the_same_files(pools: Pools, tmp_path: Path, ranks: int, workers: int) -> None:
    assert write(pools, tmp_path / "x", ranks, workers=workers) == {"made": len(PIECES), "ended": "well"}
    assert right(pools, tmp_path / "x")


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 3)])
def test_what_was_interrupted_goes_on(pools: Pools, tmp_path: Path, before: int, after: int) -> None:
    """Also with another number of ranks: a block has its file wherever it was written."""
    first = write(pools, tmp_path / "x", before, stop=3)
    assert first["ended"] == "KeyboardInterrupt"
    kept = len(journal(str(tmp_path / "x")))
    assert 3 <= kept < len(PIECES)
    assert write(pools, tmp_path / "x", after) == {"made": len(PIECES) - kept, "ended": "well"}
    assert right(pools, tmp_path / "x")


def test_blocks_of_another_source_and_damaged_ones_are_made_again(pools: Pools, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    write(pools, folder, stop=6)
    assert write(pools, folder, stop=4, source="b")["made"] == 4
    lines = journal(str(folder))
    assert {line["source"] for line in lines} == {"b"}
    spoiled = folder / lines[0]["file"]
    content = bytearray(spoiled.read_bytes())
    content[len(content) // 2] ^= 1
    spoiled.write_bytes(content)
    (folder / lines[1]["file"]).write_bytes(b"short")
    (folder / lines[2]["file"]).unlink()
    (folder / "left.distcp.partial").write_bytes(b"cut off")
    with (folder / "journal-0.jsonl").open("a") as file:
        file.write('{"source": "b", "fi')  # the line at which the machine stopped
    assert write(pools, folder, source="b") == {"made": len(PIECES) - 1, "ended": "well"}
    assert right(pools, folder)


def test_without_a_source_it_begins_anew(pools: Pools, tmp_path: Path) -> None:
    write(pools, tmp_path / "x", stop=6)
    assert write(pools, tmp_path / "x", source=None) == {"made": len(PIECES), "ended": "well"}
    assert right(pools, tmp_path / "x")


def test_an_error_is_told_as_it_is(pools: Pools, tmp_path: Path) -> None:
    assert write(pools, tmp_path / "x", 2, stop=1, error="CheckpointError")["ended"] == "CheckpointError"


def test_a_line_that_was_cut_off_costs_nothing_that_comes_later(pools: Pools, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    write(pools, folder, stop=3)
    with (folder / "journal-0.jsonl").open("a") as file:
        file.write('{"source": "a", "fi')
    assert write(pools, folder, stop=4)["made"] == 4
    assert write(pools, folder) == {"made": len(PIECES) - 7, "ended": "well"}
    assert right(pools, folder)
