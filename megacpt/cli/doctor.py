"""`megacpt doctor`: what this machine and this installation offer, and what runs in place of what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megacpt.errors import MegacptError

if TYPE_CHECKING:
    import torch

    from megacpt.ops.dispatch import FusedOp


@dataclass(frozen=True)
class Finding:
    """One row of the report: `state` is good, note (works, with a remark) or bad (something to mend)."""

    name: str
    found: str
    state: Literal["good", "note", "bad"] = "good"
    remark: str = ""


def doctor() -> None:
    """Report versions, devices, kernels and accelerators, and what is missing."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    marks = {"good": "[green]ok[/green]", "note": "[yellow]--[/yellow]", "bad": "[red]!![/red]"}
    table = Table(title="megacpt doctor", title_justify="left", show_lines=False)
    for column in ("", "what", "found", "remark"):
        table.add_column(column, overflow="fold")
    for section in (software, hardware, operations, accelerators):
        for finding in _findings(section):
            table.add_row(marks[finding.state], finding.name, escape(finding.found), escape(finding.remark))
        table.add_section()
    Console().print(table)


def _findings(section: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from section()
    except ImportError as error:  # a broken installation is what a doctor is asked about
        yield Finding(section.__name__, "unknown", "bad", f"{error.name or 'a package'} can't be imported: {error}")


def software() -> Iterator[Finding]:
    """The packages that every run needs."""
    supported = (3, 10) <= sys.version_info[:2] <= (3, 12)
    remark = sys.executable if supported else f"megacpt is tested with Python 3.10 to 3.12; this is {sys.executable}"
    yield Finding("python", platform.python_version(), "good" if supported else "bad", remark)
    yield _package("megacpt", str(Path(__file__).parents[1]))
    for name in ("torch", "numpy"):
        yield _package(name)
    core = _package("megatron-core")
    if core.state == "good" and core.found != "0.16.1":
        core = Finding(core.name, core.found, "bad", "megacpt is written against 0.16.1")
    yield core


def _package(name: str, remark: str = "") -> Finding:
    try:
        return Finding(name, version(name), "good", remark)
    except PackageNotFoundError:
        return Finding(name, "not installed", "bad", "install megacpt with `pip install -e .`")


def hardware() -> Iterator[Finding]:
    """Where a run would compute, and with what kernels can be built."""
    import torch

    from megacpt.runtime import on_cuda

    try:
        wanted = "cuda" if on_cuda() else "cpu"
        yield Finding(
            "device", wanted, "good", "MEGACPT_DEVICE=cpu keeps a run off the GPU" if wanted == "cuda" else ""
        )
    except MegacptError as error:
        yield Finding("device", "none", "bad", str(error))
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB", "good")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("CPU", f"{usable} cores", "good", f"torch computes with {torch.get_num_threads()} threads")
    yield _compiler("C++ compiler", ("c++", "g++", "clang++"), "needed to build the CPU kernels")
    yield _compiler("CUDA compiler", ("nvcc",), "needed for CUDA kernels only")


def _compiler(name: str, commands: tuple[str, ...], use: str) -> Finding:
    path = next(filter(None, map(shutil.which, commands)), None)
    if path is None:
        return Finding(name, "none", "note", use)
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.strip().splitlines()
    release = [line for line in shown if "release" in line] or shown or [path]
    return Finding(name, release[0], "good", path)


def operations() -> Iterator[Finding]:
    """Which implementation of each op a run would take, and why."""
    import torch

    from megacpt.ops.cross_entropy import CROSS_ENTROPY
    from megacpt.ops.half_linear import HALF_LINEAR
    from megacpt.ops.native import state
    from megacpt.ops.packed_linear import PACKED_LINEAR

    built = state()
    yield Finding("CPU kernels", built, "good" if built.startswith("built") else "bad")
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for dtype in (torch.float32, torch.bfloat16):
            yield _operation(CROSS_ENTROPY, device, dtype)
        yield _operation(PACKED_LINEAR, device, torch.float32 if device == "cpu" else torch.bfloat16)
    yield _operation(HALF_LINEAR, "cpu", torch.bfloat16)
    yield _decode_step()


def _operation(op: FusedOp[Any], device: str, dtype: torch.dtype) -> Finding:
    from megacpt.ops.dispatch import kernel_mode

    name = f"{op.name} {device} {str(dtype).removeprefix('torch.')}"
    try:
        choice = op.find(kernel_mode(), device, dtype)
    except MegacptError as error:
        return Finding(name, "none", "bad", str(error))
    native = choice.backend != "reference"
    found = f"native ({choice.backend})" if native else "reference (torch)"
    cost = f"; {op.fallback_cost}" if choice.fallback else ""
    return Finding(name, found, "good" if native else "note", choice.why + cost)


def _decode_step() -> Finding:
    """How `generate` computes a token of a packed folder on the CPU."""
    from megacpt.ops.dispatch import VARIABLE, kernel_mode
    from megacpt.ops.native import library

    name = "decode step cpu float32"
    try:
        if kernel_mode() == "reference":
            return Finding(name, "operations of torch", "note", f"{VARIABLE}=reference")
        library()
    except MegacptError as error:
        return Finding(name, "operations of torch", "note", f"at some milliseconds a token more: {error}")
    return Finding(name, "native (cpu)")


def accelerators() -> Iterator[Finding]:
    """Packages that speed a run up and that none requires."""
    yield apex(find_spec)
    for name, module, use in (
        ("Transformer Engine", "transformer_engine", "fused layers and FP8 on NVIDIA GPUs"),
        ("DeepSpeed", "deepspeed", "ZeRO-3 and offload"),
        ("Triton", "triton", "kernels compiled at run time"),
    ):
        found = find_spec(module) is not None
        yield Finding(name, _version_of(module) if found else "not installed", "good" if found else "note", use)


def _version_of(module: str) -> str:
    for name in (module, module.replace("_", "-")):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "installed"


def apex(find: Callable[[str], object]) -> Finding:
    """Tell NVIDIA's Apex from the package of that name on PyPI, a web toolkit that has nothing to do with it.

    Args:
        find: finds a module's spec by its name; None where there is none.
    """
    spec = find("apex")
    folders = [Path(folder) for folder in getattr(spec, "submodule_search_locations", None) or ()]
    if any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return Finding("Apex", _version_of("apex"), "good", "NVIDIA's fused optimizers and norms")
    if spec is None:
        return Finding("Apex", "not installed", "note", "NVIDIA's fused optimizers and norms; built from its sources")
    return Finding(
        "Apex",
        "another package of that name",
        "bad",
        "`pip install apex` brings an unrelated web toolkit, which is not used: run `pip uninstall apex`, and build "
        "NVIDIA's Apex from its sources if you want it",
    )
