from __future__ import annotations

import ast
from itertools import islice
from pathlib import Path

import pytest

from megacpt.demo import python_source

SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def meaning(code: str) -> str:
    """The syntax tree of `code` without docstrings and `pass`, which a removed docstring may leave behind."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        for name in ("body", "handlers", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if not isinstance(block, list):
                continue
            if isinstance(node, SCOPES) and name == "body" and ast.get_docstring(node, clean=False) is not None:
                del block[0]
            block[:] = [child for child in block if not isinstance(child, ast.Pass)]
    return ast.dump(tree)


def docstrings(code: str) -> list[str]:
    return [doc for node in ast.walk(ast.parse(code)) if isinstance(node, SCOPES) and (doc := ast.get_docstring(node))]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('"""Module."""\nx = 1\n', "x = 1\n"),
        ('"""Alone."""', ""),
        ('def f():\n    """Text\n    goes on."""\n    return 1\n', "def f():\n    return 1\n"),
        ('def f():\n    "only"\n', "def f():\n    pass\n"),
        ('def f(): "one line"\n', "def f(): pass\n"),
        ('def f(): "one line"; return 1\n', "def f(): pass; return 1\n"),
        ('class A:\n    "text"  # why\n    x = 1\n', "class A:\n    pass  # why\n    x = 1\n"),
        ('class A:\n    ("in"\n     "parts")\n    x = 1\n', "class A:\n    x = 1\n"),
        ('def f():\n    "näïve ☃"; x = "é"\n', 'def f():\n    pass; x = "é"\n'),
        (
            'try:\n    x\nexcept E:\n    def f():\n        "doc"\n',
            "try:\n    x\nexcept E:\n    def f():\n        pass\n",
        ),
        ('async def f():\n    "doc"\n    await x\n', "async def f():\n    await x\n"),
        ('x = 1\n"not a docstring"\n', 'x = 1\n"not a docstring"\n'),
        ('def f():\n    f"not {one}"\n    b"nor this"\n', 'def f():\n    f"not {one}"\n    b"nor this"\n'),
    ],
)
def test_docstrings_go_and_nothing_else(code: str, expected: str) -> None:
    assert python_source.without_docstrings(code) == expected


def test_the_standard_library_keeps_its_meaning() -> None:
    checked = 0
    for _, path in islice(python_source.files(), 12):
        code = path.read_text(encoding="utf-8")
        bare = python_source.without_docstrings(code)
        assert meaning(bare) == meaning(code), path
        assert docstrings(bare) == [], path
        checked += bool(docstrings(code))
    assert checked > 5


def test_tests_and_installed_packages_are_left_out() -> None:
    places = [place for place, _ in python_source.files()]
    assert "json/decoder.py" in places
    assert not any({"test", "tests", "site-packages", "idlelib"} & set(place.split("/")) for place in places)


def test_a_file_gives_its_code_and_its_prose(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "# Copyright Somebody.\n# All rights reserved.\n\n# Not at the top.\nx = 1\n"
        'def f():\n    """Words\n    go\n      on."""\n    return 1\n'
        'def g():\n    """\n    >>> g()\n    2\n    """\n    return 2\n'
    )
    assert python_source.split(path) == (
        "# Not at the top.\nx = 1\ndef f():\n    return 1\ndef g():\n    return 2\n",
        ["Words\ngo\n  on."],
    )


def test_the_encoding_of_a_file_is_respected(tmp_path: Path) -> None:
    path = tmp_path / "latin.py"
    path.write_bytes('# -*- coding: latin-1 -*-\ndef f():\n    "Grüße"\n    return "ä"\n'.encode("latin-1"))
    assert python_source.split(path) == ('# -*- coding: latin-1 -*-\ndef f():\n    return "ä"\n', ["Grüße"])


@pytest.mark.parametrize("content", [b"def f(:\n", b"x = '\xff'\n", b"# coding: nonsense\n", b"x\0y\n"])
def test_a_file_that_is_not_python_is_left_out(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_bytes(content)
    assert python_source.split(tmp_path / "bad.py") is None
