"""What a measurement ran on: hardware, versions and the state of the source."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

import megacpt
from megacpt.config.base import Section
from megacpt.ops.native import state
from megacpt.runtime.device import local_device


class Machine(Section):
    """The conditions of a measurement. Differences between two of them explain differences of their results.

    Attributes:
        device: the processor or GPU that computed.
        cores: cores that this process may use.
        threads: threads that torch computes with.
        load: what the machine's runnable processes would fill, in cores, when the measurement began (1 minute mean).
        kernels: the state of megacpt's own kernels.
        versions: of Python and the packages that matter.
        commit: of the checkout, with "-dirty" where files differ from it; None outside one.
    """

    device: str
    cores: int
    threads: int
    load: float
    kernels: str
    versions: dict[str, str]
    commit: str | None


def this_machine() -> Machine:
    """Describe the machine and installation that this process runs on."""
    device = local_device()
    cuda = device.type == "cuda"
    packages = {name: version(name) for name in ("torch", "megatron-core", "numpy")}
    return Machine(
        device=torch.cuda.get_device_name(device) if cuda else _processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 2),
        kernels=state(),
        versions={"python": platform.python_version(), "megacpt": megacpt.__version__, **packages},
        commit=_commit(),
    )


def _processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that the package lies in."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
