"""Megatron Core on a CPU, without patching torch and without run-time cost.

Megatron writes ``device="cuda"``, calls ``torch.cuda.*`` and ``tensor.cuda()``. On a machine without CUDA an import
hook rewrites the syntax tree of Megatron's modules as they are imported: the device name becomes ``"cpu"``,
``torch.cuda`` becomes `cuda_stand_in`, ``x.cuda()`` becomes ``x`` and pinned memory is not asked for. The result is
cached as bytecode beside Megatron's own. Where CUDA is used `install` does nothing at all.

`install` must run before ``megatron.core`` is first imported; ``megacpt.runtime`` calls it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import marshal
import os
import queue
import sys
import types
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = "megatron.core"
STAND_IN = "_megacpt_cuda"


class _OnCpu(ast.NodeTransformer):
    """The rewriting: CUDA's names in, the CPU's out."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if not isinstance(node.value, str):
            return node
        value = node.value
        if value == "cuda" or value.startswith("cuda:"):
            return ast.copy_location(ast.Constant("cpu"), node)
        if value.startswith("torch.cuda.") and value.endswith("Tensor"):
            # Compared with Tensor.type(): "torch.cuda.FloatTensor" is "torch.FloatTensor" on the CPU.
            return ast.copy_location(ast.Constant(value.replace("torch.cuda.", "torch.")), node)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        first = node.values[0] if node.values else None
        if isinstance(first, ast.Constant) and first.value == "cuda:":
            return ast.copy_location(ast.Constant("cpu"), node)
        self.generic_visit(node)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name(STAND_IN, node.ctx), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            return node.func.value
        for keyword in node.keywords:
            if keyword.arg == "pin_memory":
                keyword.value = ast.copy_location(ast.Constant(False), keyword.value)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if node.module == "torch.cuda":
            node.module = "megacpt.runtime.cuda_stand_in"
        return node


def rewrite(source: bytes, filename: str) -> types.CodeType:
    """Compile one of Megatron's modules with CUDA's names replaced by the CPU's."""
    tree = _OnCpu().visit(ast.parse(source, filename))
    at = 0
    for statement in tree.body:  # the import goes behind the docstring and `from __future__`
        is_doc = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
        if not (is_doc or is_future):
            break
        at += 1
    tree.body[at:at] = ast.parse(f"import megacpt.runtime.cuda_stand_in as {STAND_IN}").body
    return compile(ast.fix_missing_locations(tree), filename, "exec", dont_inherit=True)


def _recipe() -> str:
    """A hash of this file: bytecode of another version of the rewriting is not used."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module of Megatron through `rewrite`, keeping the bytecode under a name of its own."""

    recipe = _recipe()

    def get_code(self, fullname: str) -> types.CodeType:
        path = Path(self.get_filename(fullname))
        source = path.read_bytes()
        key = hashlib.sha256(source).digest()
        cache = Path(importlib.util.cache_from_source(str(path), optimization=f"megacpt{self.recipe}"))
        try:
            stored = cache.read_bytes()
            if stored[:32] == key:
                code: types.CodeType = marshal.loads(stored[32:])
                return code
        except (OSError, ValueError, EOFError, TypeError):
            pass  # no cache, or a damaged one: compile again
        made = rewrite(source, str(path))
        partial = cache.with_name(f"{cache.name}.{os.getpid()}")
        try:
            cache.parent.mkdir(exist_ok=True)
            partial.write_bytes(key + marshal.dumps(made))
            partial.replace(cache)
        except OSError:
            pass  # a read-only installation only costs the compilation at each start
        return made


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what lies below ``megatron.core`` and hands it to `_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != PACKAGE and not fullname.startswith(PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def _quiet() -> None:
    """Silence Megatron's import-time advice on optional packages, and only that."""
    for text in (
        "Transformer Engine",
        "Apex is not installed",
        "Apex",
        "full scope is deprecated",
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "Using or importing the ABCs",
        ".*multi_storage_client.*",
        ".*is deprecated and will be removed.*",
    ):
        warnings.filterwarnings("ignore", message=f".*{text}", module=r"megatron\.")
    # torch's own checkpoint planner still looks at ShardedTensor, which Megatron hands it.
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
    # And torch 2.13 has new names for two collectives, which Megatron calls by the old ones.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        text = f"`torch.distributed.{name}` is deprecated"
        warnings.filterwarnings("ignore", message=text, category=FutureWarning)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def install(on_cpu: bool) -> None:
    """Prepare the import of Megatron Core; rewrites its modules for the CPU where `on_cpu` says so.

    Args:
        on_cpu: whether the process computes on the CPU. With False only import-time advice is silenced.

    Raises:
        ImportError: if ``megatron.core`` has been imported before, without the rewriting.
    """
    _quiet()
    if not on_cpu or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if PACKAGE in sys.modules:
        raise ImportError("megatron.core was imported before megacpt.runtime; import megacpt.runtime first")
    sys.meta_path.insert(0, _Finder())


def _write_here(transforms: list[Any], _use_msc: bool, _rank: int, buckets: list[Any], results: Any) -> None:
    """Write the files of a checkpoint in this process, one after the other.

    Megatron forks a process a file and waits for its word; one that dies takes the run with it. The writes of a
    CPU rank gain nothing from that.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    written: dict[int, Any] = {}
    failure: Exception | None = None
    for index, bucket in enumerate(buckets):
        local: queue.Queue[Any] = queue.Queue()
        counter: queue.Queue[Any] = queue.Queue()
        counter.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, local, counter, use_fsync=True)
        _, outcome = local.get()
        if isinstance(outcome, Exception):
            failure = outcome
            break
        written[index] = outcome
    results.put(failure or written)


def _as_numbers(values: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:  # noqa: ARG001
    """Hand out a tensor as an array where one is asked for."""
    return values.numpy() if as_numpy and hasattr(values, "numpy") else values


@cache
def adapt() -> None:
    """Correct what rewriting names alone cannot, once Megatron Core is importable on the CPU."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.transformer.moe import token_dispatcher

    # What is on the CPU already is not turned into the numbers that the exchange of tokens between experts wants.
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numbers

    filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_here)
