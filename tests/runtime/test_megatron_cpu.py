"""The rewriting of Megatron's modules for the CPU, the bytecode it keeps, and what it does not answer."""

from __future__ import annotations

import importlib
import importlib.util
import marshal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megacpt.errors import SetupError
from megacpt.runtime import cuda_stand_in
from megacpt.runtime.megatron_cpu import STAND_IN, _Finder, _Loader, install, rewrite

PRELUDE = "import torch\n"


def _run(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(rewrite((PRELUDE + source).encode(), "module.py"), names)
    return names


CPU_TENSORS = {
    "a device by name": "x = torch.zeros(2, device='cuda')",
    "a device with a number": "x = torch.zeros(2, device='cuda:3')",
    "a device with a formatted number": "i = 3\nx = torch.zeros(2, device=f'cuda:{i}')",
    "a device as a default": "def make(device='cuda'):\n    return torch.zeros(2, device=device)\nx = make()",
    "a device object": "x = torch.zeros(2, device=torch.device('cuda'))",
    "the current device": "x = torch.zeros(2, device=torch.cuda.current_device())",
    "a tensor moved by .cuda()": "x = torch.zeros(2).cuda()",
    "moved with arguments": "x = torch.zeros(2).cuda(torch.cuda.current_device(), non_blocking=True)",
    "moved twice": "x = torch.ones(2).cuda().float().cuda() - 1",
    "moved by .to()": "x = torch.zeros(2).to('cuda')",
    "pinned": "x = torch.zeros(2, pin_memory=True)",
    "pinned by a variable": "pin = True\nx = torch.empty(2, pin_memory=pin).zero_()",
    "in a nested function": "def a():\n    def b():\n        return torch.zeros(2).cuda()\n    return b()\nx = a()",
    "in a lambda": "x = (lambda: torch.zeros(2, device='cuda'))()",
    "in an f-string": "x = torch.zeros(2) if f\"{torch.zeros(1, device='cuda').device}\" == 'cpu' else None",
}


@pytest.mark.parametrize("source", CPU_TENSORS.values(), ids=CPU_TENSORS)
def test_tensors_are_made_on_the_cpu(source: str) -> None:
    found = _run(source)["x"]
    assert found.device == torch.device("cpu")
    assert torch.equal(found, torch.zeros(2))


def test_types_are_those_of_the_cpu() -> None:
    names = _run("half = 'torch.cuda.HalfTensor'\nsame = torch.zeros(1).type() == 'torch.cuda.FloatTensor'")
    assert names["half"] == "torch.HalfTensor"
    assert names["same"] is True


def test_torch_cuda_is_the_stand_in() -> None:
    names = _run("from torch.cuda import _lazy_call, device as manager\na = torch.cuda\nb = torch.cuda.Stream")
    assert names["a"] is cuda_stand_in
    assert names["b"] is cuda_stand_in.Stream
    assert names["_lazy_call"] is cuda_stand_in._lazy_call
    assert names["manager"] is cuda_stand_in.device


def test_what_only_looks_like_cuda_stays() -> None:
    source = (
        "text = 'cuda is a word here'\nflag = torch.zeros(1).is_cuda\nname = 'cudagraph'\n"
        "class Box:\n    cuda = 'attribute'\nbox = Box()\nbox.cuda = 7\nkept = box.cuda\n"
        "kind = f'{1} cuda: {2}'"
    )
    names = _run(source)
    assert names["text"] == "cuda is a word here"
    assert names["flag"] is False
    assert names["name"] == "cudagraph"
    assert names["kept"] == 7
    assert names["kind"] == "1 cuda: 2"


def test_docstring_and_future_imports_stay_first() -> None:
    source = '"""What it is: cuda."""\nfrom __future__ import annotations\ndef f(x: not_defined) -> None: ...\n'
    names: dict[str, Any] = {}
    exec(rewrite(source.encode(), "module.py"), names)
    assert names["__doc__"] == "What it is: cuda."
    assert names["f"].__annotations__["x"] == "not_defined"
    assert names[STAND_IN] is cuda_stand_in


def test_line_numbers_stay(tmp_path: Path) -> None:
    code = rewrite(b"'''doc'''\n\n\nraise ValueError('here')\n", str(tmp_path / "module.py"))
    with pytest.raises(ValueError, match="here") as error:
        exec(code, {})
    assert error.traceback[-1].lineno == 3  # counted from 0


# The bytecode.


@pytest.fixture
def module(tmp_path: Path) -> tuple[Path, _Loader]:
    """A module and its loader."""
    path = tmp_path / "module.py"
    path.write_text("import torch\nwhere = torch.device('cuda')\n")
    return path, _Loader("module", str(path))


def _value(loader: _Loader) -> str:
    names: dict[str, Any] = {}
    exec(loader.get_code("module"), names)
    return str(names["where"])


def test_bytecode_is_kept_and_used(module: tuple[Path, _Loader], monkeypatch: pytest.MonkeyPatch) -> None:
    path, loader = module
    assert _value(loader) == "cpu"
    (kept,) = (path.parent / "__pycache__").iterdir()
    assert f"megacpt{_Loader.recipe}" in kept.name

    def never(*_: Any) -> Any:
        raise AssertionError("it was compiled again")

    monkeypatch.setattr("megacpt.runtime.megatron_cpu.rewrite", never)
    assert _value(loader) == "cpu"


def test_bytecode_of_another_source_is_not_used(module: tuple[Path, _Loader]) -> None:
    path, loader = module
    _value(loader)
    path.write_text("where = 'changed'\n")
    assert _value(loader) == "changed"
    assert _value(loader) == "changed"


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage"])
def test_damaged_bytecode_is_made_again(module: tuple[Path, _Loader], damage: str) -> None:
    path, loader = module
    _value(loader)
    (kept,) = (path.parent / "__pycache__").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes({"empty": b"", "cut": whole[:40], "garbage": whole[:32] + b"\x00"}[damage])
    assert _value(loader) == "cpu"
    assert kept.read_bytes() == whole


def test_a_read_only_installation_only_costs_time(module: tuple[Path, _Loader]) -> None:
    path, loader = module
    (path.parent / "__pycache__").write_text("a file where the folder would be")
    assert _value(loader) == "cpu"


def test_bytecode_does_not_mix_with_pythons_own(module: tuple[Path, _Loader]) -> None:
    path, loader = module
    _value(loader)
    (kept,) = (path.parent / "__pycache__").iterdir()
    assert str(kept) != importlib.util.cache_from_source(str(path))
    assert marshal.loads(kept.read_bytes()[32:]) == loader.get_code("module")


# Megatron itself.


def test_megatron_is_rewritten_and_nothing_else() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as megatron_random

    assert getattr(parallel_state, STAND_IN) is cuda_stand_in
    assert megatron_random._lazy_call is cuda_stand_in._lazy_call
    assert not hasattr(torch, STAND_IN)
    assert not hasattr(importlib.import_module("megacpt.engine.megatron"), STAND_IN)
    assert torch.cuda is not cuda_stand_in


def test_it_is_installed_once_and_not_for_cuda() -> None:
    before = list(sys.meta_path)
    install(on_cpu=True)
    install(on_cpu=False)
    assert sys.meta_path == before
    assert sum(isinstance(finder, _Finder) for finder in sys.meta_path) == 1


def test_megatron_imported_too_early_is_an_error() -> None:
    code = "import megatron.core\ntry:\n    import megacpt.runtime\nexcept ImportError as e:\n    print(e)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "megatron.core was imported before megacpt.runtime; import megacpt.runtime first" in done.stdout


# What the stand-in answers.


def test_an_unknown_function_is_named() -> None:
    with pytest.raises(SetupError, match=r"Megatron Core asked for torch\.cuda\.ipc_collect, which the CPU adapter"):
        _ = cuda_stand_in.ipc_collect
    with pytest.raises(SetupError, match="no_such_thing"):
        _run("torch.cuda.no_such_thing()")
    assert getattr(cuda_stand_in, "__path__", None) is None


def test_classes_pass_through() -> None:
    assert cuda_stand_in.CUDAGraph is torch.cuda.CUDAGraph
    assert cuda_stand_in.Stream.__module__ == cuda_stand_in.__name__


def test_the_generator_of_the_cpu_plays_the_devices() -> None:
    kept = cuda_stand_in.get_rng_state()
    try:
        cuda_stand_in.manual_seed(7)
        first = torch.rand(3)
        cuda_stand_in.manual_seed(7)
        state = cuda_stand_in.get_rng_state()
        assert torch.equal(torch.rand(3), first)
        cuda_stand_in.set_rng_state(state)
        assert torch.equal(torch.rand(3, generator=cuda_stand_in.default_generators[0]), first)
    finally:
        cuda_stand_in.set_rng_state(kept)


def test_streams_and_events_are_those_of_a_machine_that_has_finished() -> None:
    begin, end = cuda_stand_in.Event(enable_timing=True), cuda_stand_in.Event()
    begin.record()
    with cuda_stand_in.stream(cuda_stand_in.Stream()):
        end = cuda_stand_in.current_stream().record_event(end)
    assert end.query()
    assert 0 <= begin.elapsed_time(end) < 1000
    assert cuda_stand_in.current_stream() is cuda_stand_in.default_stream()
    assert (cuda_stand_in.is_available(), cuda_stand_in.device_count()) == (False, 0)
    assert cuda_stand_in.get_device_capability() < (7, 0)
