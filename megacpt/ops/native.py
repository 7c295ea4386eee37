"""The library of compiled CPU kernels: where it lies, whether it fits, and how it is loaded.

It is plain C++ without torch or Python headers, loaded by ctypes: it is built in seconds, with any torch. Run as a
module, this prints one line on its state.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from megacpt.errors import SetupError
from megacpt.ops.fingerprint import fingerprint

LIBRARY = Path(__file__).with_name("libmegacpt_cpu.so")
SOURCES = Path(__file__).parents[2] / "kernels" / "cpu"
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")  # by the number that the library gives
_REBUILD = "run `pip install --no-build-isolation -e .` in the checkout"


@cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        SetupError: it was not built, is of older sources than the checkout it lies in, or doesn't load here.
    """
    if not LIBRARY.exists():
        raise SetupError(
            "the CPU kernels are not built, as no C++ compiler was found when megacpt was installed; install one "
            f"(Debian: apt-get install g++), then {_REBUILD}"
        )
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        loaded.megacpt_fingerprint.restype = ctypes.c_char_p
        built_from = loaded.megacpt_fingerprint().decode()
    except (OSError, AttributeError) as error:
        raise SetupError(f"the CPU kernels don't load here ({error}); {_REBUILD}") from error
    in_checkout = (SOURCES / "fingerprint.cpp").is_file()
    if in_checkout and built_from != fingerprint(SOURCES):
        raise SetupError(f"the CPU kernels were built from other sources than this checkout's; {_REBUILD}")
    return loaded


def instruction_set() -> int:
    """The best instruction set that both the library and this processor know; an index of `INSTRUCTION_SETS`."""
    return int(library().megacpt_instruction_set())


def state() -> str:
    """One line: whether the kernels are there, and for which instruction set, or why not."""
    try:
        return f"built, {INSTRUCTION_SETS[instruction_set()]}"
    except SetupError as missing:
        return f"none, the torch reference runs instead: {missing}"


if __name__ == "__main__":
    print(f"CPU kernels: {state()}")
