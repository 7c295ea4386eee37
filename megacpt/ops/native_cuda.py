"""The library of CUDA kernels: whether it was built, fits this checkout and this device, and how it is called.

Like the one for the CPU it knows neither torch nor Python, is loaded by ctypes, and brings its own CUDA runtime: it
loads (and says what it was built for) on machines without a GPU too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from megacpt.errors import SetupError
from megacpt.ops.fingerprint import fingerprint

LIBRARY = Path(__file__).with_name("libmegacpt_cuda.so")
SOURCES = Path(__file__).parents[2] / "kernels" / "cuda"
_REBUILD = (
    "run `MEGACPT_CUDA_ARCHS=native pip install --no-build-isolation -e .` in the checkout, with nvcc on the PATH"
)


@cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        SetupError: it was not built, is of other sources or for other devices, or doesn't load here.
    """
    if not LIBRARY.exists():
        raise SetupError(f"the CUDA kernels are not built; {_REBUILD}")
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        names = loaded.megacpt_cuda_fingerprint, loaded.megacpt_cuda_architectures
        for name in names:
            name.restype = ctypes.c_char_p
        built_from, architectures = (name().decode() for name in names)
    except (OSError, AttributeError) as error:
        raise SetupError(f"the CUDA kernels don't load here ({error}); {_REBUILD}") from error
    if (SOURCES / "fingerprint.cu").is_file() and built_from != fingerprint(SOURCES):
        raise SetupError(f"the CUDA kernels were built from other sources than this checkout's; {_REBUILD}")
    if torch.cuda.is_available() and not runs_on(architectures, torch.cuda.get_device_capability()):
        device = "".join(map(str, torch.cuda.get_device_capability()))
        raise SetupError(
            f"the CUDA kernels were built for {architectures}, and this device is an sm_{device}; {_REBUILD}"
        )
    return loaded


def runs_on(architectures: str, device: tuple[int, int]) -> bool:
    """Whether code for `architectures` ("80;90") runs on a device of a compute capability (major, minor).

    Machine code runs on the same major version, from its own minor version on.
    """
    built = [divmod(int(name), 10) for name in architectures.split(";")]
    return any(major == device[0] and minor <= device[1] for major, minor in built)


def current_stream(device: torch.device) -> int:
    """The handle of torch's current stream on a device."""
    return int(torch.cuda.current_stream(device).cuda_stream)


@contextmanager
def launched(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Make `device` the current one, and give a function that checks what a launcher returned.

    Raises:
        RuntimeError: a launch failed.
    """

    def check(status: int) -> None:
        if status != 0:
            raise RuntimeError(f"a kernel could not be launched on {device}: CUDA error {status}")

    if device.type == "cuda":
        with torch.cuda.device(device):
            yield check
    else:
        yield check


if __name__ == "__main__":
    try:
        library()
        print("CUDA kernels: built")
    except SetupError as missing:
        print(f"CUDA kernels: none, {missing}")
