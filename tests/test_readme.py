"""The README's commands, run in order on small text; only the lengths are shortened."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What makes a run of minutes one of seconds, behind every command that trains.
SHORT = [
    "stage.tokens=4k",
    "batch.sequences=4",
    "batch.seq_length=64",
    "evaluate.tokens=1k",
    "model.layers=2",
    "model.hidden=32",
    "model.ffn=64",
]
SAME_MODEL = [word for word in SHORT if not word.startswith("model.")]


def commands() -> list[list[str]]:
    """The commands of the README that a newcomer types, without those that fetch or install."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]
    return [line for line in lines if line[0] in ("megacpt", "torchrun")]


def runnable(command: list[str]) -> list[str]:
    """The command as this machine can run it: the module of this interpreter, and short trainings."""
    if command[0] == "megacpt":
        command = [sys.executable, "-m", "megacpt", *command[1:]]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    verb = command[command.index("megacpt") + 1]
    if verb == "train":
        return [*command, *SHORT]
    if verb == "continue":
        return [*command, *SAME_MODEL]
    return command


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README assumes it: text, and the configs of the repository."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    for name, text in (("english", "It was the best of times, number {}. "), ("python", "def f{}(x): return x\n")):
        documents = [{"text": text.format(i) * 30} for i in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    return folder


def test_the_readme_shows_commands() -> None:
    verbs = {command[command.index("megacpt") + 1] for command in commands()}
    assert {"data", "config", "train", "continue", "anneal", "eval", "generate", "lineage", "report"} <= verbs


@pytest.mark.timeout(900)
def test_the_commands_of_the_readme_run(workplace: Path) -> None:
    environment = {**os.environ, "MEGACPT_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for command in commands():
        done = subprocess.run(
            runnable(command), cwd=workplace, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    assert "<html" in (workplace / "report.html").read_text()[:200]


def test_the_links_of_the_docs_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
