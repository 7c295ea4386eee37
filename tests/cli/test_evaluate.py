"""``megacpt eval`` and ``megacpt flips`` on small trained runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megacpt.config import dump
from megacpt.continuation.ledger import Ledger
from megacpt.data.stream import TokenStream
from megacpt.evaluate.instances import read_record
from tests.cli.command import finish, launch_ranks, megacpt
from tests.small import make_stream, run_config

TASK = """
task: sea
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two checkpoints, held-out streams and a task."""
    folder = tmp_path_factory.mktemp("eval")
    mixture = {"english": str(make_stream(folder, "english"))}
    config = run_config(folder / "run", mixture, steps=40, checkpoint={"every": "20 steps"})
    (folder / "run.yaml").write_text(dump(config))
    make_stream(folder, "english-valid", 12)
    make_stream(folder, "c-valid", 12)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "sea.yaml").write_text(TASK)
    question = {"question": "the sea was", "choices": [" old", " ;;;;;;;;"], "answer": 0}
    (folder / "questions.jsonl").write_text(3 * (json.dumps(question) + "\n"))
    trained = megacpt("train", "run.yaml", folder=folder)
    assert trained.status == 0, trained.err
    return folder


def test_losses_of_streams(home: Path) -> None:
    options = ("--stream", "english-valid", "--stream", "c-valid", "--json", "losses.json")
    found = megacpt("eval", "run", *options, folder=home)
    assert found.status == 0, found.err
    assert "english-valid" in found.out
    content = json.loads((home / "losses.json").read_text())
    assert list(content) == ["checkpoint", "streams"]
    assert content["checkpoint"] == "run"
    english, c = content["streams"]
    assert (english["stream"], c["stream"]) == ("english-valid", "c-valid")
    assert english["loss"] < c["loss"]
    assert english["tokens"] == TokenStream.open(home / "english-valid").tokens - 1


def test_records_and_their_flips(home: Path) -> None:
    checkpoints = [home / "run" / "checkpoints" / f"step-000000{step}" for step in (20, 40)]
    for name, checkpoint in zip(("before", "after"), checkpoints, strict=True):
        options = ("--stream", "english-valid", "--tokens", "300", "--instances", f"{name}.jsonl")
        found = megacpt("eval", checkpoint, *options, folder=home)
        assert found.status == 0, found.err
    header, instances = read_record(home / "after.jsonl")
    assert header.ledger == Ledger.read(checkpoints[1]).id
    assert header.streams == {"english-valid": TokenStream.open(home / "english-valid").meta.content_hash}
    assert sum(one.tokens for one in instances) == 300
    found = megacpt("flips", "before.jsonl", "after.jsonl", "--json", "flips.json", folder=home)
    assert found.status == 0, found.err
    assert "english-valid" in found.out
    (flips,) = json.loads((home / "flips.json").read_text())["flips"]
    assert flips["predictions"] == 300
    assert flips["hits_after"] - flips["hits_before"] == flips["won"] - flips["lost"]
    assert flips["won"] > flips["lost"]  # twenty more steps teach it more English


def test_tasks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    options = ("--lm-eval", "sea", "--include-path", "tasks", "--limit", "2", "--json", "tasks.json")
    ranks = launch_ranks(
        "eval", "run", *options, "--instances", "tasks.jsonl", "parallel.tensor=2", folder=home, ranks=2
    )
    found = [finish(rank, home) for rank in ranks]
    assert [one.status for one in found] == [0, 0], found[0].err
    assert "acc ↑" in found[0].out
    content = json.loads((home / "tasks.json").read_text())
    (score,) = content["lm_eval"]["tasks"]
    assert (score["task"], score["metric"], score["questions"], content["streams"]) == ("sea", "acc", 2, [])
    assert content["lm_eval"]["limit"] == 2
    _, instances = read_record(home / "tasks.jsonl")
    assert [(one.stream, one.index, one.nats) for one in instances] == [("sea:acc:none", n, None) for n in (0, 1)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("eval", "run"), ("--stream", "--lm-eval")),
        (("eval", "run", "--stream", "c-valid", "--tokens", "many"), ("--tokens: 'many'",)),
        (("eval", "run", "--stream", "c-valid", "--instances", "no/x.jsonl"), ("no/x.jsonl cannot be written",)),
        (("eval", "run", "--stream", "c-valid", "--json", "no/x.json"), ("there is no folder no",)),
        (("flips", "run.yaml", "run.yaml"), ("run.yaml is not an instance record",)),
    ],
)
def test_mistakes_end_with_status_2(home: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    found = megacpt(*arguments, folder=home)
    assert found.status == 2
    assert all(word in found.err for word in words)
    assert "Traceback" not in found.err
