"""A hash of the kernel sources: the build writes it into the library, loading compares it with the checkout.

Needs the standard library alone, as the build runs it before megacpt can be imported.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path


def fingerprint(sources: Path) -> str:
    """The hash of all C++ sources and headers in the folder `sources`, with their names."""
    files = sorted(path for path in sources.iterdir() if path.suffix in (".h", ".cpp", ".cuh", ".cu"))
    return sha256(b"\0".join(path.name.encode() + b"\0" + path.read_bytes() for path in files)).hexdigest()[:16]
