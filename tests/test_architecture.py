"""The house stands as docs/architecture.md says: rooms import only from floors below, and start quickly."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megacpt"
FLOORS = [
    {"errors", "__init__"},
    {"ops", "config"},
    {"runtime", "optim", "quant"},
    {"model", "data"},
    {"engine"},
    {"checkpoint", "evaluate"},
    {"continuation"},
    {"convert"},
    {"train", "report", "serve"},
    {"demo", "bench"},
    {"recipes"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """The room of ``megacpt.room.file``; the package itself is ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR else "__init__"


def imports() -> Iterator[tuple[Path, str]]:
    """Every file of the package with every module of the package that it imports."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("megacpt"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from ((path, name) for name in (names if node.module == "megacpt" else [node.module]))
            elif isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names if alias.name.startswith("megacpt"))


def test_every_room_has_a_floor() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert rooms == set(FLOOR)


def test_rooms_import_only_from_floors_below() -> None:
    wrong = []
    for path, module in imports():
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        there = room_of(module)
        if here != there and FLOOR[there] >= FLOOR[here]:
            wrong.append(f"{path.relative_to(ROOT)} ({here}) imports {module} ({there})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("megacpt.config", ["torch", "numpy"]),
        ("megacpt.cli.main", ["torch", "numpy", "matplotlib"]),
        ("megacpt.data", ["torch", "megatron"]),
        ("megacpt.optim.schedules", ["torch", "megatron"]),
        ("megacpt.serve.opened", ["megatron", "transformers", "matplotlib"]),
        ("megacpt.serve.generation", ["megatron", "transformers", "matplotlib"]),
    ],
)
def test_light_rooms_stay_light(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_files_stay_readable() -> None:
    long = {p: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"longer than a reader can hold: {long}"
