"""The CUDA kernels for a CPU, which several files of tests run."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "kernels" / "cuda"
COMPILER = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
FLAGS = ["-x", "c++", "-std=c++17", "-O1", "-fPIC", "-Wno-unknown-pragmas", "-Werror=all"]
DEFINED = ['-DMEGACPT_FINGERPRINT="emulated"', '-DMEGACPT_ARCHITECTURES="none"']


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library of CUDA kernels, built for the CPU."""
    assert COMPILER, "the native builds need a C++ compiler (Debian: apt-get install g++)"
    folder = tmp_path_factory.mktemp("emulated")
    sources = sorted(SOURCES.glob("*.cu"))
    made = [folder / f"{source.stem}.o" for source in sources]

    def build(source: Path, to: Path) -> None:
        subprocess.run([COMPILER, *FLAGS, *DEFINED, "-c", source, "-o", to], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, sources, made))
    subprocess.run([COMPILER, "-shared", *made, "-o", folder / "kernels.so"], check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))
