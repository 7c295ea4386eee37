"""Builds the native CPU kernels and packs configs/; everything else about the package stands in pyproject.toml.

The kernels are plain C++17 without torch or Python headers, so the build needs a compiler and nothing else, and takes
about two seconds. Without a compiler, or if it fails, megacpt installs all the same and runs its torch reference.

The CUDA kernels need nvcc, and minutes. They are built where torch itself is built for CUDA and nvcc is there, or where
MEGACPT_CUDA_ARCHS names devices: "80;90;100" (the default), "native" for those of this machine, "none" for no build.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SOURCES = Path("kernels") / "cpu"
PER_INSTRUCTION_SET = "*_rows.cpp"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-psabi"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
# Sets that are worth it for some sources alone.
MORE_SETS = {"packed_linear_int8_rows.cpp": {"avx512vnni": [*INSTRUCTION_SETS["avx512"], "-mavx512vnni"]}}
CUDA_SOURCES = Path("kernels") / "cuda"
CUDA_FLAGS = ["-O3", "-std=c++17", "--cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = "MEGACPT_CUDA_ARCHS"
CUDA_LIBRARY = "megacpt.ops.libmegacpt_cuda"


class BuildPackage(build_py):
    """Puts configs/ into the package: it stands beside it in a checkout, and inside it once installed."""

    def run(self) -> None:
        """Build the package; an editable one reads the checkout's configs/."""
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "configs", Path(self.build_lib) / "megacpt" / "configs", dirs_exist_ok=True)


class BuildKernels(build_ext):
    """Compiles the kernels with the C++ compiler directly: what comes out is a library, not a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the library without Python's version: it has no tie to one."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        """Build the library, or print one line on why there is none."""
        library = Path(self.get_ext_fullpath(ext.name))
        library.unlink(missing_ok=True)
        if ext.name == CUDA_LIBRARY:
            self._build_cuda(library)
            return
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if compiler is None:
            self._without("no C++ compiler was found; install g++ or clang++ and install megacpt again")
            return
        try:
            self._compile(compiler.split(), library)
        except (OSError, subprocess.CalledProcessError) as error:
            library.unlink(missing_ok=True)
            self._without(f"{compiler} failed: {error}")

    def _without(self, why: str) -> None:
        print(f"megacpt: installing without native CPU kernels, the torch reference runs instead: {why}", flush=True)

    def _compile(self, compiler: list[str], library: Path) -> None:
        sources = ROOT / SOURCES
        objects = Path(self.build_temp) / "kernels"
        objects.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        native = runpy.run_path(str(ROOT / "megacpt" / "ops" / "fingerprint.py"))
        flags = [*FLAGS, f'-DMEGACPT_FINGERPRINT="{native["fingerprint"](sources)}"']
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        per_set = set(sources.glob(PER_INSTRUCTION_SET))
        made = []
        for source in sorted(sources.glob("*.cpp")):
            sets = {**INSTRUCTION_SETS, **MORE_SETS.get(source.name, {})}
            variants = sets if source in per_set and x86 else {"baseline": []}
            for isa, extra in variants.items():
                made.append(objects / f"{source.stem}.{isa}.o")
                self._run([*compiler, *flags, *extra, f"-DMEGACPT_ISA={isa}", "-c", source, "-o", made[-1]])
        self._run([*compiler, "-shared", "-pthread", *made, "-o", library])

    def _build_cuda(self, library: Path) -> None:
        nvcc, architectures = shutil.which("nvcc"), cuda_architectures()
        if nvcc is None:
            print(f"megacpt (CUDA): no kernels, as there is no nvcc on the PATH, though {CUDA_ARCHS} asks for them")
            return
        print(
            f"megacpt (CUDA): building kernels for {architectures}, some minutes; {CUDA_ARCHS}=none skips it",
            flush=True,
        )
        library.parent.mkdir(parents=True, exist_ok=True)
        native = runpy.run_path(str(ROOT / "megacpt" / "ops" / "fingerprint.py"))
        named = {"FINGERPRINT": native["fingerprint"](ROOT / CUDA_SOURCES), "ARCHITECTURES": architectures}
        flags = [*CUDA_FLAGS, *(f'-DMEGACPT_{name}="{value}"' for name, value in named.items())]
        flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures.split(";")]
        sources = sorted((ROOT / CUDA_SOURCES).glob("*.cu"))
        try:
            self._run([nvcc, *flags, "--threads=0", "-shared", *sources, "-o", library])
        except (OSError, subprocess.CalledProcessError) as error:
            library.unlink(missing_ok=True)
            print(f"megacpt (CUDA): installing without kernels, nvcc failed: {error}", flush=True)

    def _run(self, command: list[str | Path]) -> None:
        subprocess.run([str(part) for part in command], check=True)


def cuda_architectures() -> str:
    """Say what the CUDA kernels are to be built for, such as "80;90"; nothing for no build."""
    wanted = os.environ.get(CUDA_ARCHS)
    if wanted == "native":
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        return ";".join(sorted({capability.replace(".", "") for capability in found}))
    if wanted is not None:
        return "" if wanted == "none" else wanted
    try:
        import torch
    except ImportError:  # an isolated build
        return ""
    return "80;90;100" if torch.version.cuda and shutil.which("nvcc") else ""


def kernels() -> list[Extension]:
    """Declare the libraries and their sources (which the source distribution carries too)."""

    def library(name: str, folder: Path, source: str, header: str) -> Extension:
        def files(kind: str) -> list[str]:
            return [str(path.relative_to(ROOT)) for path in sorted((ROOT / folder).glob(kind))]

        return Extension(name, sources=files(source), depends=files(header), optional=True)

    found = [library("megacpt.ops.libmegacpt_cpu", SOURCES, "*.cpp", "*.h")]
    if cuda_architectures():
        found.append(library(CUDA_LIBRARY, CUDA_SOURCES, "*.cu", "*.*h"))
    return found


setup(ext_modules=kernels(), cmdclass={"build_py": BuildPackage, "build_ext": BuildKernels})
