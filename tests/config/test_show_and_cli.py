from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megacpt.cli.config import app
from megacpt.config import load_run, run_from_mapping
from megacpt.config.library import configs_folder
from megacpt.config.show import derived, show
from megacpt.config.yaml_text import parse_document
from megacpt.errors import ConfigError, LayoutError
from tests.config.helpers import make_run

RUN = configs_folder() / "runs" / "english.yaml"
STAGE = configs_folder() / "stages" / "python.yaml"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def failure(*arguments: object) -> str:
    result = call(*arguments)
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


def test_derived_numbers() -> None:
    run = make_run("parallel.tensor=2", "stage.replay.share=25%")
    assert derived(run) == {
        "tokens_per_step": 8192,
        "stage_steps": 2442,
        "stage_tokens": 20_004_864,
        "replay_tokens": 5_001_216,
    }
    more = derived(run, vocab=257, world_size=4)
    assert (more["padded_vocab"], more["data_parallel"], more["microbatches"]) == (384, 2, 4)
    assert more["parameters"] == run.model.parameters(257)


def test_what_is_shown_is_a_run_file() -> None:
    run = make_run("stage.replay.share=25%")
    text = show(run, vocab=257, world_size=1)
    assert run_from_mapping(parse_document(text, "shown").data) == run
    assert "#   stage_steps      2,442" in text


def test_show() -> None:
    result = call("show", RUN, "model=small", "optim.peak_lr=2e-4", "--ranks", 2)
    assert result.exit_code == 0
    assert "peak_lr: 2.0e-4" in result.output
    assert "#   data_parallel    2" in result.output
    assert "name: small" in result.output


def test_show_without_the_tokenizer(tmp_path: Path) -> None:
    result = call("show", RUN, f"tokenizer={tmp_path / 'tokenizer.json'}")
    assert result.exit_code == 0
    assert "the size of the model is not known: tokenizer:" in result.stderr
    assert "parameters" not in result.stdout


def test_show_a_stage() -> None:
    result = call("show", STAGE, "--continues", RUN, "seed=5")
    assert result.exit_code == 0
    assert "run: DIR" in result.output
    assert "seed: 5" in result.output
    assert "share: 25%" in result.output


def test_show_refuses_a_layout_that_does_not_fit() -> None:
    result = call("show", RUN, "parallel.pipeline=3", "--ranks", 3)
    assert isinstance(result.exception, LayoutError)


def test_check_lists_everything(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(RUN.read_text().replace("data/english", str(tmp_path / "english")))
    assert [
        line.partition(":")[0] for line in failure("check", run, "parallel.tensor=3", "tokenizer=no.json").splitlines()
    ] == [
        "tokenizer",
        "parallel.tensor",
        "stage.mixture.english.path",
        "evaluate.streams.english",
    ]


def test_check_of_a_good_run(tmp_path: Path) -> None:
    for name in ("english", "english-valid", "python", "python-valid"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stream.json").write_text(json.dumps({}))
    run, stage = tmp_path / "run.yaml", tmp_path / "stage.yaml"
    run.write_text(RUN.read_text().replace("data/", f"{tmp_path}/"))
    stage.write_text(STAGE.read_text().replace("data/", f"{tmp_path}/"))
    result = call("check", run, "--ranks", 4, "parallel.tensor=2")
    assert result.exit_code == 0, result.exception
    assert result.output.startswith(f"{run} is fine: tokens_per_step 8,192, stage_steps 2,442")
    assert "parameters 836,736" in result.output
    result = call("check", stage, "--continues", tmp_path, "run=runs/x")
    assert result.exit_code == 0, result.exception
    assert "6 ranks" in failure("check", run, "--ranks", 6, "parallel.tensor=4")


def test_explain() -> None:
    result = call("explain", "optim.peak_lr")
    assert result.exit_code == 0
    assert result.output.startswith("optim.peak_lr: number\n")
    assert "optim.peak_lr=3e-4" in result.output
    assert "schedule" in call("explain").output
    assert failure("explain", "optim.peek_lr") == "unknown key 'optim.peek_lr'; did you mean 'optim.peak_lr'?"


def test_typos_on_the_command_line() -> None:
    assert failure("show", RUN, "optim.peek_lr=1") == (
        "'optim.peek_lr=1': unknown key 'optim.peek_lr'; did you mean 'optim.peak_lr'?"
    )
    near = RUN.with_name("englsh.yaml")
    assert failure("check", near) == f"{near} does not exist; did you mean 'english.yaml'?"


@pytest.mark.parametrize("command", ["show", "check", "explain"])
def test_help_has_examples(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"megacpt config {command} " in result.output


def test_configurations_need_no_torch_and_no_numpy() -> None:
    code = (
        "import sys, megacpt.cli.config, megacpt.config.explain, megacpt.config.show as show\n"
        f"from megacpt.config import load_run; show.show(load_run({str(RUN)!r}), 257)\n"
        "print(sorted({'torch', 'numpy', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_shown_run_can_be_saved_and_used(tmp_path: Path) -> None:
    saved = tmp_path / "mine.yaml"
    saved.write_text(call("show", RUN, "seed=9").stdout)
    assert load_run(saved) == load_run(RUN, ["seed=9"])
