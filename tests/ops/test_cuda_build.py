"""The CUDA kernels' machine code and build, where there is nvcc; none of it needs a GPU."""

from __future__ import annotations

import ctypes
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megacpt.errors import SetupError
from megacpt.ops import native_cuda
from megacpt.ops.fingerprint import fingerprint

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "kernels" / "tools" / "check_sass.py"
LIBRARY = Path("megacpt") / "ops" / "libmegacpt_cuda.so"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
tool = runpy.run_path(str(TOOL))
needs_disassembler = pytest.mark.skipif(
    tool["disassembler"]() is None, reason="no nvdisasm: install CUDA's, or `pip install nvidia-cuda-nvdisasm`"
)


@needs_nvcc
@needs_disassembler
@pytest.mark.timeout(900)  # a minute on two idle cores, for sm_90; `check_sass.py` without --archs checks them all
def test_machine_code_has_no_spills_wide_loads_and_no_more_instructions_than_recorded() -> None:
    done = subprocess.run([sys.executable, TOOL, "--archs", "90"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


LISTING = """
.text._ZN7megacpt5routeINS_3RowIfLi2ELi16EEELNS0_4KeysE1EEEvPK:
.L_x_1:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/              @!P0 LDG.E{wide} R24, desc[UR10][R46.64] ;
.L_x_3:
        /*0020*/                   IADD3 R1, R1, 1, RZ ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
        /*0040*/                   {other} ;
        /*0050*/               @P0 BRA `(.L_x_2) ;
        /*0060*/                   EXIT ;
.L_x_4:
        /*0070*/                   BRA `(.L_x_4);
"""


@pytest.mark.parametrize(
    ("wide", "other", "budget", "expected"),
    [
        (".128", "NOP", 1.5, None),
        (".64", "NOP", 1.5, "no LDG of 128 bits"),
        (".128", "STL [R1], R8", 1.5, "1 accesses to local memory"),
        (".128", "NOP", 1.0, "1 instructions a row, and the budget is 1"),
        (".128", "NOP", None, "no budget"),
    ],
)
def test_what_the_check_finds(wide: str, other: str, budget: float | None, expected: str | None) -> None:
    (kernel,) = tool["parse"](LISTING.format(wide=wide, other=other))
    assert kernel.name == "route float32 2x16 plain"
    assert kernel.instructions_each() == (5 + 7 * 2) * 2 / 32  # seven more rounds of the inner loop, of two
    found = tool["faults"](kernel, budget)
    assert [expected in fault for fault in found] == ([True] if expected else [])


PRODUCT = """
.text._ZN7megacpt49_GLOBAL__N_14packed_productINS0_5ShapeILi1ELi4ELb1EEEEEvNS0_7ProductE:
.L_x_1:
        /*0000*/                   NOP ;
.L_x_2:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0018*/                   LDG.E.128 R24, desc[UR10][R46.64] ;
        /*0020*/               @P0 BRA `(.L_x_2) ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR10][R46.64] ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(("budget", "expected"), [(6 / 1024, []), (3 / 1024, ["instructions a weight"])])
def test_what_the_check_counts_of_products(budget: float, expected: list[str]) -> None:
    (kernel,) = tool["parse"](PRODUCT)
    assert kernel.name == "packed_product 8x256 grouped"
    assert kernel.instructions_each() == 6 / (4 * 64 * 4)  # of the outer loop; four tiles a thread, four steps a pass
    found = tool["faults"](kernel, budget)
    assert [want in fault for want, fault in zip(expected, found, strict=True)] == [True] * len(expected)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the build reads, with one small kernel file."""
    for file in ("setup.py", "megacpt/ops/fingerprint.py", "kernels/cuda/fingerprint.cu", "kernels/cuda/device.cuh"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "kernels" / "cpu").mkdir()
    shutil.copy(ROOT / "kernels" / "cpu" / "fingerprint.cpp", tmp_path / "kernels" / "cpu")
    return tmp_path


def build(checkout: Path, **changes: str) -> str:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = os.environ | changes
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True).stdout


@needs_nvcc
def test_builds_a_library_that_loads_without_a_gpu(checkout: Path) -> None:
    assert "building kernels for 90" in build(checkout, MEGACPT_CUDA_ARCHS="90")
    library = ctypes.CDLL(str(checkout / LIBRARY))
    for name, wanted in (("fingerprint", fingerprint(checkout / "kernels" / "cuda")), ("architectures", "90")):
        function = getattr(library, f"megacpt_cuda_{name}")
        function.restype = ctypes.c_char_p
        assert function().decode() == wanted


def test_builds_nothing_unasked_and_says_what_is_missing(checkout: Path) -> None:
    assert "CUDA" not in build(checkout, MEGACPT_CUDA_ARCHS="none")
    assert "there is no nvcc on the PATH" in build(checkout, MEGACPT_CUDA_ARCHS="90", PATH="/nowhere")
    assert not (checkout / LIBRARY).exists()


def test_why_there_are_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cuda, "LIBRARY", tmp_path / "none.so")
    with pytest.raises(SetupError, match=r"not built.*MEGACPT_CUDA_ARCHS=native"):
        native_cuda.library.__wrapped__()
    (tmp_path / "none.so").write_text("no library")
    with pytest.raises(SetupError, match="don't load here"):
        native_cuda.library.__wrapped__()


@pytest.mark.parametrize(
    ("device", "runs"), [((8, 0), True), ((8, 6), True), ((9, 0), True), ((10, 0), False), ((7, 5), False)]
)
def test_code_runs_on_its_own_major_version(device: tuple[int, int], runs: bool) -> None:
    assert native_cuda.runs_on("80;90", device) is runs
