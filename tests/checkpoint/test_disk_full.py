"""A full disk during a save: a clear error on every rank, and nothing that was there is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pool import Pools


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize(
    ("ranks", "how"),
    [(1, "tensors"), (1, "ledger"), (1, "first"), (2, "tensors"), (2, "ledger"), (2, "first"), (2, "last")],
)
def test_a_full_disk(pools: Pools, tmp_path: Path, ranks: int, how: str, asynchronous: bool) -> None:
    found = pools(ranks).run("tests.checkpoint.cases:fail", run=str(tmp_path), how=how, asynchronous=asynchronous)
    for result in found:
        assert result["said"].startswith("CheckpointError")
        assert result["left"] == ["step-00000001"]
        assert result["wrong"] is None
        assert result["same"]
        assert result["later"] == ["step-00000002"]
    said = found[0]["said"]
    assert "no space left (or a quota or file size limit reached) while writing" in said
    assert "the checkpoints before it are untouched" in said
    assert "Free some space, or lower checkpoint.keep_last, and run the same command again" in said
