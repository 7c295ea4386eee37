"""Checks the machine code of the CUDA kernels, on a machine without a GPU.

Compiles every .cu of kernels/cuda and disassembles it. Each kernel must be free of spills and local memory, and read
(and write) aligned rows in pieces of 128 bits; the router's may not have more instructions a row, and those of ternary
matrices not more instructions a weight, than kernels/cuda/budgets.json says. Run as ``python
kernels/tools/check_sass.py [--archs 80,90,100] [--record]``; --record writes the budgets anew.

Instructions a row are a static count: every instruction of the loop over rows, as if all branches were taken (softmax
and sigmoid, aligned and not), times the lanes a row has, over 32. In the forward pass the largest inner loop, that over
the k best, counts eight times; other inner loops count once. Instructions a weight are those of a loop over the weights
that a thread has in one pass: for quantisation the innermost that reads pieces of 128 bits, for products the one with
tensor cores. Both are there to notice growth and measure nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CUDA = Path(__file__).parents[1] / "cuda"
BUDGETS = CUDA / "budgets.json"
ARCHITECTURES = ("80", "90", "100")
CHOSEN = 8
SLACK = 1.03  # other versions of nvcc
WIDE = {
    "route": ("LDG",),
    "route_gradient": ("LDG", "STG"),
    "softmax_sums": ("LDG",),
    "balance": ("LDG",),
    "ternarise": ("LDG", "STG"),
    "packed_product": ("LDG", "LDGSTS"),
    "unpack": ("LDG", "STG"),
}
COUNTED = ("route", "route_gradient", "ternarise", "packed_product")
FORMATS = {"float": "float32", "BFloat16": "bfloat16", "Float16": "float16"}
KEYS = ("packed", "plain", "grouped")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*);")
_TEXT = re.compile(r"^\.text\.(\S+):")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_MANGLED = re.compile(
    r"\d+(route_gradient|route|softmax_sums|balance)INS_3RowI(f|NS_8BFloat16E|NS_7Float16E)Li(\d+)ELi(\d+)EE"
    r"(?:ELNS0_4KeysE(\d))?"
)
_QUANTISED = re.compile(
    r"\d+(ternarise|row_sums|unpack)I(f|h|NS_8BFloat16E|NS_7Float16E)(f|NS_8BFloat16E|NS_7Float16E|S\w*_)?E"
)
_PRODUCT = re.compile(r"\d+packed_productINS0_5ShapeILi(\d+)ELi(\d+)ELb(\d)EE")
_PIECE = 8  # weights that a thread quantises at once
_TILE = 64  # weights that a thread has of a tile


@dataclass(frozen=True)
class Kernel:
    """The instructions of a kernel in their order, and where its backward branches lead.

    `weights`: of a ternary matrix, that a thread has in one pass; 0 for kernels whose rows are spread over `lanes`.
    """

    name: str
    lanes: int
    instructions: list[str]
    loops: list[tuple[int, int]]
    weights: int = 0

    def instructions_each(self) -> float:
        """Instructions a weight, or warp-instructions a row, as the module says."""
        if self.name.startswith("packed_product"):
            return max(self._size(loop) for loop in self.loops if self._holds(loop, "HMMA", "")) / self.weights
        if self.weights:
            return min(self._size(loop) for loop in self.loops if self._holds(loop, "LDG.", ".128")) / self.weights
        outer = max(self.loops, key=lambda loop: loop[1] - loop[0])
        inner = [loop for loop in self.loops if loop != outer and outer[0] <= loop[0] and loop[1] <= outer[1]]
        best = max(inner, key=self._size, default=None)
        each_best = self._size(best) if best is not None and self.name.startswith("route ") else 0
        return (self._size(outer) + (CHOSEN - 1) * each_best) * self.lanes / 32

    def _holds(self, loop: tuple[int, int], start: str, part: str) -> bool:
        inside = self.instructions[loop[0] : loop[1] + 1]
        return any(name.startswith(start) and part in name for name in inside)

    @staticmethod
    def _size(loop: tuple[int, int]) -> int:
        return loop[1] - loop[0] + 1


def _format(mangled: str) -> str:
    short = {"f": "float", "h": "bytes"}
    return FORMATS.get(name := short.get(mangled, re.sub(r"NS_\d+|E$", "", mangled)), name)


def readable(mangled: str) -> tuple[str, int, int]:
    """A kernel's name as the budgets have it, the lanes of a row and the weights of a pass (0 where there are none)."""
    if found := _MANGLED.search(mangled):
        kernel, number, lanes, each, keys = found.groups()
        parts = [kernel, _format(number), f"{lanes}x{each}", *([KEYS[int(keys)]] if keys else [])]
        return " ".join(parts), int(lanes), 0
    if found := _QUANTISED.search(mangled):
        kernel, number, other = found.groups()
        parts = [kernel, _format(number), *([_format(number if other[0] == "S" else other)] if other else [])]
        return " ".join(parts), 0, _PIECE
    if found := _PRODUCT.search(mangled):
        tokens, tiles, grouped = map(int, found.groups())
        stages = 2 if tokens == 8 else 4  # tiles beside each other in a pass
        return f"packed_product {8 * tokens}x{64 * tiles}{' grouped' * grouped}", 0, _TILE * tiles * stages
    return mangled, 0, 0


def parse(listing: str) -> list[Kernel]:
    """The kernels of a disassembly."""
    kernels: list[Kernel] = []
    for part in re.split(r"(?m)^(?=\.text\.\S+:$)", listing)[1:]:
        instructions: list[str] = []
        labels: dict[str, int] = {}
        loops = []
        for line in part.splitlines()[1:]:
            if label := _LABEL.match(line):
                labels[label[1]] = len(instructions)
            elif found := _INSTRUCTION.match(line):
                target = re.search(r"\.L_x_\d+", found[3])
                if found[2].startswith("BRA") and target and target[0] in labels:
                    at = len(instructions)
                    if labels[target[0]] < at:  # a branch to itself only fills up the end
                        loops.append((labels[target[0]], at))
                instructions.append(found[2])
        mangled = _TEXT.match(part)
        assert mangled is not None
        name, lanes, weights = readable(mangled[1])
        kernels.append(Kernel(name, lanes, instructions, loops, weights))
    return kernels


def faults(kernel: Kernel, budget: float | None) -> list[str]:
    """What is wrong with a kernel."""
    found = []
    local = sum(name.startswith(("LDL", "STL")) for name in kernel.instructions)
    if local:
        found.append(f"{local} accesses to local memory (spills or a stack frame)")
    for load in WIDE.get(kernel.name.split()[0], ()):
        if not any(name.startswith(load) and ".128" in name for name in kernel.instructions):
            found.append(f"no {load} of 128 bits")
    if kernel.name.split()[0] in COUNTED:
        count = kernel.instructions_each()
        unit, digits = ("weight", 2) if kernel.weights else ("row", 0)
        if budget is None:
            found.append("no budget: run with --record")
        elif count > budget * SLACK:
            found.append(f"{count:.{digits}f} instructions a {unit}, and the budget is {budget:.{digits}f}")
    return found


def disassembler() -> str | None:
    """nvdisasm: on the PATH, of CUDA, or of the packages nvidia-cuda-nvdisasm and triton."""
    packages = Path(sysconfig.get_paths()["purelib"])
    places = [os.environ.get("NVDISASM", ""), shutil.which("nvdisasm") or "", "/usr/local/cuda/bin/nvdisasm"]
    places += [str(path) for path in (*packages.glob("nvidia/*/bin/nvdisasm"), *packages.glob("triton/**/nvdisasm"))]
    return next((place for place in places if place and Path(place).is_file()), None)


def disassembled(source: Path, architecture: str) -> list[Kernel]:
    """The kernels of a source, compiled for an architecture."""
    tool = disassembler()
    assert tool is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        options = ["-O3", "-std=c++17", f"-arch=sm_{architecture}", "-cubin"]
        named = ['-DMEGACPT_FINGERPRINT=""', '-DMEGACPT_ARCHITECTURES=""']
        subprocess.run(["nvcc", *options, *named, source, "-o", cubin], check=True)
        return parse(subprocess.run([tool, "-c", cubin], check=True, capture_output=True, text=True).stdout)


def check(architectures: list[str], record: bool) -> list[str]:
    """All faults of all kernels, by architecture; `record` writes the budgets first."""
    sources = [source for source in sorted(CUDA.glob("*.cu")) if "__global__" in source.read_text()]
    jobs = [(source, architecture) for architecture in architectures for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: disassembled(*job), jobs))
    found = {architecture: [] for architecture in architectures}  # type: dict[str, list[Kernel]]
    for (_, architecture), kernels in zip(jobs, results, strict=True):
        found[architecture] += kernels
    budgets: dict[str, dict[str, float]] = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    if record:
        for architecture, kernels in found.items():
            counted = [kernel for kernel in kernels if kernel.name.split()[0] in COUNTED]
            budgets[f"sm_{architecture}"] = {
                k.name: round(k.instructions_each(), 2 if k.weights else 1) for k in counted
            }
        BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
    return [
        f"sm_{architecture} {kernel.name}: {fault}"
        for architecture, kernels in found.items()
        for kernel in kernels
        for fault in faults(kernel, budgets.get(f"sm_{architecture}", {}).get(kernel.name))
    ]


def main() -> int:
    """Check, print what is wrong, and return the exit status."""
    parser = argparse.ArgumentParser(description="checks the machine code of the CUDA kernels")
    parser.add_argument("--archs", default=",".join(ARCHITECTURES), help="compute capabilities, such as 80,90,100")
    parser.add_argument("--record", action="store_true", help="write the budgets anew")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None or disassembler() is None:
        print("needs nvcc, and nvdisasm (of CUDA, or `pip install nvidia-cuda-nvdisasm`)")
        return 2
    wrong = check(arguments.archs.split(","), arguments.record)
    print("\n".join(wrong) or "all kernels are as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
