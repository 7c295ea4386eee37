"""The standard library as text: its code without docstrings, its docstrings, and the topics of Python's help."""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from importlib import import_module
from inspect import cleandoc
from pathlib import Path

from megacpt.errors import SetupError

# Tests are many and repetitive; the others are installed programs, tables of characters, or copies.
_EXCLUDED = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "encodings",
    "pydoc_data",
}
_LICENCE = re.compile(r"copyright|licen[sc]e", re.IGNORECASE)
_MOST_DOCTEST = 0.2  # share of the lines of a docstring

# Where statements hold other statements; expressions hold no docstrings, and most of a tree is expressions.
_BODIES = ("body", "handlers", "orelse", "finalbody", "cases")
_Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def topics() -> Iterator[tuple[str, str]]:
    """Yield the texts of Python's ``help()`` about the language, as (place, text)."""
    try:
        texts: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise SetupError(f"this Python lacks the texts of help(), pydoc_data.topics: {error}") from error
    for name in sorted(texts):
        yield f"pydoc_data/topics/{name}", texts[name]


def files() -> Iterator[tuple[str, Path]]:
    """Yield the source files of the standard library as (place within it, path)."""
    root = sysconfig.get_path("stdlib")
    count = 0
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _EXCLUDED]
        for name in names:
            if name.endswith(".py"):
                count += 1
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path
    if not count:
        raise SetupError(f"the source of the standard library is not in {root}: install a Python that has it")


def split(path: Path) -> tuple[str, list[str]] | None:
    """Return the code of a Python file without docstrings, and its docstrings that are prose; None if unreadable."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        with warnings.catch_warnings():  # old modules hold escapes that the parser warns about
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None
    found = list(_docstrings(tree))
    return _without_licence(_remove(text, found)), [text for _, _, text in found if _is_prose(text)]


def without_docstrings(text: str) -> str:
    """Return the Python source `text` without its docstrings; it stays valid Python. Raises SyntaxError."""
    return _remove(text, list(_docstrings(ast.parse(text))))


def _docstrings(tree: ast.Module) -> Iterator[tuple[_Scope, ast.Expr, str]]:
    """Yield each docstring in the order of the text: what it belongs to, its place, its text without indentation."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, _Scope) and node.body and isinstance(first := node.body[0], ast.Expr):
            value = first.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield node, first, cleandoc(value.value)
        for name in reversed(_BODIES):
            pending.extend(reversed(getattr(node, name, ())))


def _remove(text: str, found: Iterable[tuple[_Scope, ast.Expr, str]]) -> str:
    lines = text.encode().split(b"\n")  # columns of the tree count UTF-8 bytes
    # From the bottom up, so that the places above stay what they are.
    for scope, node, _ in sorted(found, key=lambda item: item[1].lineno, reverse=True):
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        if not before.strip() and not after.strip() and (len(scope.body) > 1 or isinstance(scope, ast.Module)):
            lines[first : last + 1] = []
        else:  # a body needs a statement
            lines[first : last + 1] = [before + b"pass" + after]
    return b"\n".join(lines).decode()


def _is_prose(docstring: str) -> bool:
    lines = docstring.splitlines()
    return sum(line.lstrip().startswith((">>>", "...")) for line in lines) <= _MOST_DOCTEST * len(lines)


def _without_licence(code: str) -> str:
    """Drop those paragraphs of the comments at the top that speak of a licence: the same text in many files."""
    lines = code.splitlines(keepends=True)
    top = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    paragraphs = "".join(lines[:top]).split("\n\n")
    return "\n\n".join(text for text in paragraphs if not _LICENCE.search(text)) + "".join(lines[top:])
