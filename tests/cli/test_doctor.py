"""What `megacpt doctor` says of this machine, of a broken one, and of packages that only share a name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from megacpt.cli import doctor


def found(section: Iterator[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in section}


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.doctor()
    text = capsys.readouterr().out
    for word in ("torch", "megatron-core", "CPU", "cross_entropy", "Apex", "compiler"):
        assert word in text


def test_kernels_and_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGACPT_KERNELS", "native")
    native = found(doctor.operations())
    for name in ("cross_entropy cpu float32", "packed linear cpu float32", "decode step cpu float32"):
        assert native[name].found == "native (cpu)"
    monkeypatch.setenv("MEGACPT_KERNELS", "reference")
    finding = found(doctor.operations())["cross_entropy cpu bfloat16"]
    assert (finding.found, finding.remark) == ("reference (torch)", "MEGACPT_KERNELS=reference")
    finding = found(doctor.operations())["decode step cpu float32"]
    assert (finding.found, finding.remark) == ("operations of torch", "MEGACPT_KERNELS=reference")


def test_mistakes_in_the_environment_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGACPT_KERNELS", "nativ")
    finding = found(doctor.operations())["cross_entropy cpu float32"]
    assert finding.state == "bad"
    assert "did you mean 'native'" in finding.remark


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert found(doctor.hardware())["C++ compiler"].state == "note"


def test_a_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Iterator[doctor.Finding]:
        raise ImportError("libcudart.so.13 is missing", name="torch")
        yield

    monkeypatch.setattr(doctor, "hardware", broken)
    doctor.doctor()
    assert "libcudart" in capsys.readouterr().out


def test_apex_of_nvidia_and_its_namesake(tmp_path: Path) -> None:
    here = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    namesake = doctor.apex(lambda _: here)
    assert namesake.state == "bad"
    assert "pip uninstall apex" in namesake.remark
    (tmp_path / "multi_tensor_apply").mkdir()
    assert doctor.apex(lambda _: here).state == "good"
    assert doctor.apex(lambda _: None).found == "not installed"
