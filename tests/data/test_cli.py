from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megacpt.cli.data import app
from megacpt.data.stream import TokenStream
from megacpt.errors import ConfigError, DataError
from tests.data.conftest import TEXT, write_jsonl
from tests.data.test_indexed import write_with_megatron


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_from_text_to_a_stream_with_an_own_tokenizer(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"{TEXT} {i}" for i in range(200)], field="body")
    trained = call(
        "train-tokenizer",
        tmp_path / "a.jsonl",
        "--vocab-size",
        320,
        "--out",
        tmp_path / "tok",
        "--field",
        "body",
    )
    assert "320 pieces" in trained.output
    options = ["--tokenizer", tmp_path / "tok", "--field", "body", "--workers", 1, "--holdout", "10%"]
    prepared = call("prepare", tmp_path / "a.jsonl", "--out", tmp_path / "s", *options)
    assert "documents" in prepared.output
    assert f"{tmp_path / 's'}-valid" in prepared.output.replace("\n", "")
    both = TokenStream.open(tmp_path / "s").documents + TokenStream.open(tmp_path / "s-valid").documents
    assert both == 200
    shown = call("inspect", tmp_path / "s", "--documents", 1).output
    assert "naïve café" in shown
    assert "fingerprint" in shown


def test_megatron_files_are_inspected_and_adopted(tmp_path: Path) -> None:
    write_with_megatron(tmp_path / "m", [[[104, 105, 256]]])
    assert "megacpt data adopt" in call("inspect", tmp_path / "m").output
    assert "1 documents, 3 tokens" in call("adopt", tmp_path / "m", "--tokenizer", "bytes").output
    assert "hi" in call("inspect", tmp_path / "m").output


def test_mistakes_are_errors_of_the_program_not_tracebacks_of_the_parser(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match="--holdout much"):
        call(
            "prepare",
            tmp_path / "a.txt",
            "--tokenizer",
            "bytes",
            "--out",
            tmp_path / "s",
            "--holdout",
            "much",
        )
    with pytest.raises(DataError, match="there is no tokenizer"):
        call("prepare", tmp_path / "a.txt", "--tokenizer", "byts", "--out", tmp_path / "s")


def test_scores_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "quality": 0.5}\n{"text": "b", "quality": 2}\n')
    options = ["--tokenizer", "bytes", "--workers", 1, "--score", "quality"]
    call("prepare", tmp_path / "a.jsonl", "--out", tmp_path / "s", *options)
    assert TokenStream.open(tmp_path / "s").indexed.scores.tolist() == [0.5, 2.0]
    assert "score quality" in call("inspect", tmp_path / "s").output


@pytest.mark.parametrize("command", ["prepare", "train-tokenizer", "inspect", "adopt"])
def test_every_command_has_an_example(command: str) -> None:
    assert f"megacpt data {command}" in call(command, "--help").output
