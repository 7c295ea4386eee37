from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megacpt.cli.report import report
from megacpt.errors import ConfigError

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


@pytest.mark.parametrize("compare", ["nothing", "=runs/a", "name="])
def test_a_comparison_needs_a_name_and_a_run(compare: str, family: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--compare .*: write NAME=RUN"):
        report([family["english"]], tmp_path / "report.html", compare=[compare])
