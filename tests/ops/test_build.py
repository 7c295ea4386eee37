"""The native build: it needs a compiler alone, and an installation without one goes on."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megacpt.ops.fingerprint import fingerprint

ROOT = Path(__file__).parents[2]
LIBRARY = Path("megacpt") / "ops" / "libmegacpt_cpu.so"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the build reads."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    (tmp_path / LIBRARY).parent.mkdir(parents=True)
    shutil.copy(ROOT / "megacpt" / "ops" / "fingerprint.py", tmp_path / "megacpt" / "ops")
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


def build(checkout: Path, **changes: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "CXX"} | changes
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_builds_without_torch_or_python_headers(checkout: Path) -> None:
    assert "without native" not in build(checkout)
    library = ctypes.CDLL(str(checkout / LIBRARY))
    library.megacpt_fingerprint.restype = ctypes.c_char_p
    assert library.megacpt_fingerprint().decode() == fingerprint(checkout / "kernels" / "cpu")


def test_threads_of_its_own_where_no_pool_is_loaded(checkout: Path) -> None:
    build(checkout)
    script = """
import sys
from ctypes import CDLL, c_int64
import numpy as np
run = CDLL(sys.argv[1]).megacpt_cross_entropy_partials
rows, width = 512, 700
logits = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
target, results = np.zeros(rows, np.int64), []
for threads in (1, 4):
    out = np.zeros((3, rows), np.float32)
    run(logits.ctypes, 0, target.ctypes, *(row.ctypes for row in out), *map(c_int64, (rows, width, 0)), threads, 0)
    results.append(out)
assert "torch" not in sys.modules
assert np.array_equal(*results)
assert np.array_equal(results[0][0], logits.max(1)) and np.array_equal(results[0][2], logits[:, 0])
"""
    subprocess.run([sys.executable, "-c", script, str(checkout / LIBRARY)], check=True)


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"PATH": "/nowhere"}, "no C++ compiler was found"), ({"CXX": "/nowhere/c++"}, "/nowhere/c++ failed")],
)
def test_installs_without_a_compiler(checkout: Path, changes: dict[str, str], why: str) -> None:
    lines = [line for line in build(checkout, **changes).splitlines() if line.startswith("megacpt:")]
    assert len(lines) == 1
    assert why in lines[0]
    assert not (checkout / LIBRARY).exists()


def test_the_fingerprint_follows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text("one")
    first = fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("not a source")
    assert fingerprint(tmp_path) == first
    (tmp_path / "a.cpp").write_text("two")
    second = fingerprint(tmp_path)
    (tmp_path / "a.cpp").rename(tmp_path / "b.cpp")
    assert len({first, second, fingerprint(tmp_path)}) == 3
