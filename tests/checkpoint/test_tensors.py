"""What is read from disk runs no foreign code, and does not fit another model unnoticed."""

from __future__ import annotations

import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megacpt.checkpoint.tensors import METADATA, check_index, check_metadata
from megacpt.errors import CheckpointError
from tests.pool import Pools

CASES = "tests.checkpoint.cases"


@pytest.fixture(scope="module")
def saved(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    run = tmp_path_factory.mktemp("saved")
    pools(1).run(f"{CASES}:save", run=str(run), steps=[1])
    return run / "checkpoints" / "step-00000001"


def _call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls ``module.name(argument)``; a dotted name is looked up through the module."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


FOREIGN = [
    ("os", "system"),
    ("posix", "system"),
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("subprocess", "call"),
    ("torch", "load"),
    ("torch.hub", "load"),
    # Through what an allowed module has imported, or itself can do.
    ("torch.distributed.checkpoint.filesystem", "os.system"),
    ("torch.distributed.checkpoint.filesystem", "os"),
    ("torch.distributed.checkpoint.filesystem", "FileSystem.mkdir"),
    ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
    ("torch.distributed.checkpoint.metadata", "os.system"),
    ("torch.distributed.checkpoint.format_utils", "dcp_to_torch_save"),
    ("megatron.core.dist_checkpointing.serialization", "load"),
    ("torch.distributed.checkpointing", "x"),
]


@pytest.mark.parametrize(("module", "name"), FOREIGN)
def test_an_index_that_would_run_code_is_refused_unrun(tmp_path: Path, module: str, name: str) -> None:
    marker = tmp_path / "it ran"
    (tmp_path / METADATA).write_bytes(_call(module, name, f"touch '{marker}'"))
    with pytest.raises(CheckpointError, match=r"which no checkpoint index needs|is damaged"):
        check_metadata(tmp_path)
    assert not marker.exists()


class _Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def test_such_an_index_does_not_run_when_the_checkpoint_is_loaded(pools: Pools, saved: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "step-00000001", tmp_path / "it ran"
    shutil.copytree(saved, folder)
    (folder / METADATA).write_bytes(pickle.dumps(_Runs(f"touch '{marker}'")))
    (said,) = pools(1).run(f"{CASES}:load_error", folder=str(folder), verified=False)
    assert "refers to posix.system, which no checkpoint index needs" in said
    (said,) = pools(1).run(f"{CASES}:load_error", folder=str(folder))
    assert f"{folder / METADATA}" in said
    assert not marker.exists()


def test_nor_do_the_common_values(pools: Pools, saved: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "step-00000001", tmp_path / "it ran"
    shutil.copytree(saved, folder)
    (folder / "common.pt").write_bytes(pickle.dumps(_Runs(f"touch '{marker}'")))
    (said,) = pools(1).run(f"{CASES}:load_error", folder=str(folder), verified=False)
    assert said == f"CheckpointError: {folder}: common.pt or a tensor file is damaged, or holds more than data"
    assert not marker.exists()


def test_the_index_of_a_checkpoint_passes(saved: Path) -> None:
    check_metadata(saved)


def test_a_damaged_or_missing_index(saved: Path, tmp_path: Path) -> None:
    whole = (saved / METADATA).read_bytes()
    for content in (b"", b"no pickle", whole[:-1], whole[: len(whole) // 2], whole[1:], b"\x80\x04\x88R."):
        (tmp_path / METADATA).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
            check_metadata(tmp_path)
    (tmp_path / METADATA).unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata is missing: .* is no complete checkpoint"):
        check_metadata(tmp_path)


def test_any_flipped_byte_of_the_index_is_an_error_or_harmless(saved: Path, tmp_path: Path) -> None:
    whole = (saved / METADATA).read_bytes()
    for place in range(0, len(whole), 41):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        (tmp_path / METADATA).write_bytes(flipped)
        with suppress(CheckpointError):  # and no other error, whatever the bytes mean now
            check_metadata(tmp_path)


@pytest.mark.parametrize(
    "model",
    [
        {"layers": 4},
        {"hidden": 64, "head_dim": 16},
        {"ffn": 64},
        {"qk_norm": True},
        {"bias": True},
    ],
    ids=lambda model: next(iter(model)),
)
def test_another_model_is_refused(pools: Pools, saved: Path, model: dict[str, Any]) -> None:
    (said,) = pools(1).run(f"{CASES}:load_error", folder=str(saved), model=model)
    assert said.startswith(f"CheckpointError: {saved} does not fit this model")


@pytest.mark.parametrize("change", [-1, 1, None])
def test_an_index_that_does_not_describe_its_files(saved: Path, tmp_path: Path, change: int | None) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    check_index(folder)
    path = next(folder.glob("*.distcp"))
    if change is None:
        path.rename(folder / "other.distcp")
    else:
        os.truncate(path, path.stat().st_size + change)
    with pytest.raises(CheckpointError, match=r"\.metadata does not describe"):
        check_index(folder)
