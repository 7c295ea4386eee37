"""Which implementation runs, and what is said where a kernel is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megacpt.errors import SetupError
from megacpt.ops import native
from megacpt.ops.cross_entropy import CROSS_ENTROPY
from megacpt.ops.dispatch import FusedOp, Kernel

F32 = frozenset({torch.float32})


def missing(why: str) -> str:
    raise SetupError(why)


def op(*kernels: Kernel[str]) -> FusedOp[str]:
    return FusedOp("toy", "torch", "ten times slower", kernels)


cuda = Kernel("cuda", F32, lambda: "CUDA")
triton = Kernel("triton", F32, lambda: "Triton")
cpu = Kernel("cpu", F32, lambda: "C++")
broken = Kernel("cuda", F32, lambda: missing("no nvcc"))


@pytest.mark.parametrize(
    ("mode", "kernels", "device", "taken"),
    [
        ("auto", (cpu, triton, cuda), "cuda", "CUDA"),
        ("auto", (cpu, triton, broken), "cuda", "Triton"),
        ("auto", (cpu, broken), "cuda", "torch"),
        ("auto", (cuda, cpu), "cpu", "C++"),
        ("auto", (cuda,), "cpu", "torch"),
        ("native", (triton, cuda), "cuda", "CUDA"),
        ("reference", (cuda, cpu), "cpu", "torch"),
    ],
)
def test_order(
    monkeypatch: pytest.MonkeyPatch, mode: str, kernels: tuple[Kernel[str], ...], device: str, taken: str
) -> None:
    monkeypatch.setenv("MEGACPT_KERNELS", mode)
    assert op(*kernels).choose(device, torch.float32).functions == taken


@pytest.mark.parametrize("mode", ["auto", "native", "reference"])
def test_float64_is_the_reference(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("MEGACPT_KERNELS", mode)
    assert op(cpu).choose("cpu", torch.float64).backend == "reference"


def test_a_forced_kernel_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGACPT_KERNELS", "native")
    with pytest.raises(SetupError, match="toy has no kernel: no nvcc"):
        op(broken).choose("cuda", torch.float32)
    with pytest.raises(SetupError, match="no kernel for float16 on cpu"):
        op(cpu).choose("cpu", torch.float16)


def test_a_fallback_is_logged_once_with_its_cost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MEGACPT_KERNELS", "auto")
    toy = op(broken)
    with caplog.at_level(logging.WARNING, "megacpt.ops"):
        for _ in range(3):
            toy.choose("cuda", torch.float32)
    assert [record.getMessage() for record in caplog.records] == [
        "toy runs on the torch reference, ten times slower: no nvcc"
    ]


def test_the_reference_by_choice_is_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MEGACPT_KERNELS", "reference")
    with caplog.at_level(logging.WARNING, "megacpt.ops"):
        op(cpu).choose("cpu", torch.float32)
    assert not caplog.records


def test_an_unknown_mode_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGACPT_KERNELS", "referance")
    with pytest.raises(SetupError, match="did you mean 'reference'"):
        op(cpu).choose("cpu", torch.float32)


def test_cross_entropy_takes_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGACPT_KERNELS", "auto")
    for dtype in (torch.float32, torch.bfloat16):
        assert CROSS_ENTROPY.choose("cpu", dtype).backend == "cpu"


@pytest.fixture
def uncached() -> Iterator[None]:
    """Let a test load the library anew, and others after it."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("uncached")
class TestLibrary:
    """The library of compiled kernels."""

    def test_here(self) -> None:
        assert native.state().startswith("built, ")

    def test_not_built(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
        with pytest.raises(SetupError, match="no C\\+\\+ compiler was found"):
            native.library()
        assert "the torch reference runs instead" in native.state()

    def test_not_a_library(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        broken = tmp_path / "broken.so"
        broken.write_bytes(b"\x7fELF, but no more")
        monkeypatch.setattr(native, "LIBRARY", broken)
        with pytest.raises(SetupError, match="don't load here"):
            native.library()

    def test_of_other_sources(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "fingerprint.cpp").write_text("// newer than the library")
        monkeypatch.setattr(native, "SOURCES", tmp_path)
        with pytest.raises(SetupError, match="built from other sources"):
            native.library()
