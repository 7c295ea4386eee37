"""The manifest finds every kind of damage, and names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megacpt.checkpoint.manifest import MANIFEST, digest, read_manifest
from megacpt.errors import CheckpointError
from tests.pool import Pools

CASES = "tests.checkpoint.cases"
FILES = {"a.distcp": b"0123456789" * 50, "b.distcp": b"", "ledger.json": b"{}"}


@pytest.fixture
def folder(pools: Pools, tmp_path: Path) -> Path:
    """A folder of some files and their manifest."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (manifest,) = pools(1).run(f"{CASES}:describe", folder=str(tmp_path))
    (tmp_path / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return tmp_path


def _damage(pools: Pools, folder: Path, ranks: int = 1, hashes: bool = True) -> str | None:
    found = pools(ranks).run(f"{CASES}:damage", folder=str(folder), hashes=hashes)
    assert found == [found[0]] * ranks
    answer: str | None = found[0]
    return answer


def test_it_lists_every_file_with_size_and_hash(folder: Path) -> None:
    found = read_manifest(folder)
    assert {name: entry["bytes"] for name, entry in found.items()} == {n: len(c) for n, c in FILES.items()}
    assert all(entry["sha256"] == digest(folder / name) for name, entry in found.items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_undamaged_folder(pools: Pools, folder: Path, ranks: int) -> None:
    assert _damage(pools, folder, ranks) is None


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(pools: Pools, folder: Path, name: str) -> None:
    (folder / name).unlink()
    found = _damage(pools, folder)
    assert found is not None
    assert f"{folder / name} is missing" in found


@pytest.mark.parametrize("change", [b"", b"0123456789" * 49, b"0123456789" * 51])
def test_a_file_of_another_size(pools: Pools, folder: Path, change: bytes) -> None:
    (folder / "a.distcp").write_bytes(change)
    found = _damage(pools, folder, hashes=False)
    assert found is not None
    assert f"a.distcp has {len(change)} bytes, and should have 500" in found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["a.distcp", "ledger.json"])
def test_a_flipped_byte(pools: Pools, folder: Path, ranks: int, name: str) -> None:
    content = bytearray(FILES[name])
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    found = _damage(pools, folder, ranks)
    assert found is not None
    assert f"{folder / name} has changed" in found
    assert _damage(pools, folder, ranks, hashes=False) is None


def test_a_flipped_byte_in_the_manifest_itself(pools: Pools, folder: Path) -> None:
    """Wherever it is: either something is said to be wrong, or the byte had no meaning."""
    content = (folder / MANIFEST).read_bytes()
    flips = []
    for place in range(len(content)):
        for bit in (0, 3, 5):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            flips.append((MANIFEST, bytes(flipped)))
    (found,) = pools(1).run(f"{CASES}:damages", folder=str(folder), files=flips)
    meant = json.loads(content)["files"]
    for (_, changed), wrong in zip(flips, found, strict=True):
        if wrong is None:
            assert json.loads(changed)["files"] == meant
        else:
            assert str(folder) in wrong


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe",
        b'{"format": 1}',
        b'{"format": 1, "files": []}',
        b'{"format": 1, "files": {"ledger.json": 2}}',
        b'{"format": 1, "files": {"ledger.json": {"bytes": 2}}}',
        b'{"format": 1, "files": {"ledger.json": {"bytes": "2", "sha256": "0"}}}',
    ],
)
def test_a_manifest_that_is_none(pools: Pools, folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    found = _damage(pools, folder)
    assert found is not None
    assert f"{folder / MANIFEST} is damaged" in found


def test_no_manifest(pools: Pools, folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint: manifest\.json is missing"):
        read_manifest(folder)
    assert "no complete checkpoint" in str(_damage(pools, folder))
