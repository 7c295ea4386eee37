from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megacpt.cli.report import report
from megacpt.errors import CheckpointError, ConfigError
from tests.report.lab import Lab

app = typer.Typer()
app.command()(report)


def test_the_command_writes_the_page(family: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    compare = f"replay=0 %={family['python-0']}"
    arguments = [str(family["python"]), "--out", str(out), "--title", "Mine", "--compare", compare, "--label", "25 %"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert (result.exit_code, result.output.replace("\n", "")) == (0, str(out))
    assert "<h1>Mine</h1>" in out.read_text()
    assert "by 0.61 with replay=0 %" in out.read_text()


def test_the_page_goes_into_the_run_folder_unless_told_otherwise(lab: Lab, tmp_path: Path) -> None:
    run = lab.run("first", "english", {"english": (8.0, 2.0)})
    result = CliRunner().invoke(app, [str(run), "--json", str(tmp_path / "report.json")], catch_exceptions=False)
    assert (result.exit_code, result.output.replace("\n", "")) == (0, str(run / "report.html"))
    assert "<h1>first</h1>" in (run / "report.html").read_text()
    assert '"format": 1' in (tmp_path / "report.json").read_text()


def test_a_run_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing is no folder: give a run folder"):
        report([tmp_path / "nothing"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compare", ["nothing", "=runs/a", "name="])
def test_a_comparison_needs_a_name_and_a_run(compare: str, family: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--compare .*: write NAME=RUN"):
        report([family["english"]], tmp_path / "report.html", compare=[compare])
