"""Tasks of lm-eval on local files: by hand, in any layout, without a network."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from megacpt.errors import SetupError
from megacpt.evaluate.lm_eval import TaskResults, TaskScore, evaluate_tasks
from tests.evaluate.lm_eval_cases import bits_per_byte
from tests.evaluate.test_scoring import LAYOUTS
from tests.pool import Pools

CASES = "tests.evaluate.lm_eval_cases"
NAMES = ["sea_choice", "sea_text", "sea_answer"]
QUESTIONS: list[dict[str, Any]] = [
    {"question": "the sea was", "choices": [" old", " a struct of ships"], "answer": 0, "text": "the old ship"},
    {"question": "he was in the", "choices": [" void", " wind"], "answer": 1, "text": "it was on a night, and then"},
    {"question": "a sailor", "choices": [" was it", " ;;;;", " x"], "answer": 0, "text": "to it"},
    {"question": "on the", "choices": [" night", " lambda"], "answer": 1, "text": "for the wind " * 12},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
output_type: {kind}
target_delimiter: ""
fewshot_delimiter: "|"
fewshot_config: {{sampler: first_n}}
metadata: {{version: 2.5}}
metric_list:
"""
METRIC = "  - {{metric: {0}, aggregation: {1}, higher_is_better: {2}}}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tasks of every kind of request."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "sea.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))

    def task(name: str, kind: str, metrics: str, rest: str) -> None:
        text = TASK.format(name=name, kind=kind, data=folder / "sea.jsonl") + metrics + rest
        (folder / f"{name}.yaml").write_text(text)

    accuracy = METRIC.format("acc", "mean", "true") + METRIC.format("acc_norm", "mean", "true")
    choice = 'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
    task("sea_choice", "multiple_choice", accuracy, choice)
    bits = METRIC.format("bits_per_byte", "bits_per_byte", "false")
    task("sea_text", "loglikelihood_rolling", bits, 'doc_to_text: ""\ndoc_to_target: "{{text}}"\n')
    exact = METRIC.format("exact_match", "mean", "true")
    settings = "generation_kwargs: {until: [e], max_gen_toks: 8}\n"
    answer = 'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[answer]}}"\n'
    task("sea_answer", "generate_until", exact, settings + answer)
    (folder / "lost.yaml").write_text("task: lost\ndataset_path: nowhere/nothing\noutput_type: multiple_choice\n")
    return str(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.getbasetemp() / "hf")


@pytest.fixture(scope="module")
def alone(pools: Pools, folder: str, cache: str) -> TaskResults:
    (found,) = pools(1).run(f"{CASES}:tasks", folder=folder, cache=cache, names=NAMES)
    assert isinstance(found, TaskResults)
    return found


def _values(results: TaskResults) -> dict[tuple[str, str], float]:
    return {(score.task, score.metric): score.value for score in results.scores}


def test_by_hand(pools: Pools, alone: TaskResults) -> None:
    (expected,) = pools(1).run(f"{CASES}:by_hand", questions=QUESTIONS)
    found = _values(alone)
    right = [one["answer"] for one in QUESTIONS]
    likeliest = [int(np.argmax(scores)) for scores in expected["choices"]]
    by_length = [
        int(np.argmax([score / len(choice) for score, choice in zip(scores, one["choices"], strict=True)]))
        for scores, one in zip(expected["choices"], QUESTIONS, strict=True)
    ]
    assert found["sea_choice", "acc"] == np.mean(np.equal(likeliest, right))
    assert found["sea_choice", "acc_norm"] == np.mean(np.equal(by_length, right))
    marks = {(q.stream, q.index): bool(q.hit[0]) for q in alone.questions}
    for index in range(len(QUESTIONS)):
        assert marks["sea_choice:acc:none", index] == (likeliest[index] == right[index])
        assert marks["sea_choice:acc_norm:none", index] == (by_length[index] == right[index])


def test_perplexity_by_hand(pools: Pools, folder: str, cache: str) -> None:
    """Of texts that fit into one window; the longer one is read in several."""
    (found,) = pools(1).run(f"{CASES}:tasks", folder=folder, cache=cache, names=["sea_text"], limit=3)
    (expected,) = pools(1).run(f"{CASES}:by_hand", questions=QUESTIONS[:3])
    bits = bits_per_byte(expected["texts"], QUESTIONS[:3])
    assert _values(found)["sea_text", "bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_what_is_said_of_a_score(alone: TaskResults) -> None:
    score = next(score for score in alone.scores if score.metric == "acc")
    assert score == TaskScore("sea_choice", "acc", "none", score.value, score.stderr, 4, 0, "2.5", True)
    assert score.stderr is not None
    bits = next(score for score in alone.scores if score.metric == "bits_per_byte")
    assert bits.higher_is_better is False
    assert {q.stream for q in alone.questions} == {
        "sea_choice:acc:none",
        "sea_choice:acc_norm:none",
        "sea_answer:exact_match:none",
    }
    assert set(alone.versions().values()) == {"2.5"}


def test_worked_examples_go_before_the_question(pools: Pools, folder: str, cache: str) -> None:
    (found,) = pools(1).run(f"{CASES}:tasks", folder=folder, cache=cache, names=["sea_choice"], limit=1, fewshot=1)
    assert found.scores[0].fewshot == 1
    (expected,) = pools(1).run(f"{CASES}:by_hand", questions=QUESTIONS[:1], shots="the sea was old|")
    mark = next(q for q in found.questions if q.stream == "sea_choice:acc:none")
    assert bool(mark.hit[0]) == (int(np.argmax(expected["choices"][0])) == QUESTIONS[0]["answer"])


@pytest.mark.parametrize("name", ["dp2", "tp2"])
def test_the_layout_does_not_matter(pools: Pools, folder: str, cache: str, alone: TaskResults, name: str) -> None:
    ranks, changes = LAYOUTS[name]
    for found in pools(ranks).run(f"{CASES}:tasks", folder=folder, cache=cache, names=NAMES, **changes):
        assert _values(found) == pytest.approx(_values(alone), rel=1e-5)
        assert [q.to_json() for q in found.questions] == [q.to_json() for q in alone.questions]


@pytest.mark.parametrize("name", ["cp2", "pp2", "tp2 sequence"])
def test_scores_need_no_whole_sequence(pools: Pools, folder: str, cache: str, alone: TaskResults, name: str) -> None:
    ranks, changes = LAYOUTS[name]
    for found in pools(ranks).run(f"{CASES}:tasks", folder=folder, cache=cache, names=NAMES[:2], **changes):
        expected = {key: value for key, value in _values(alone).items() if key[0] != "sea_answer"}
        assert _values(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["sea_choise"], "ConfigError: --lm-eval: there is no task 'sea_choise'; did you mean 'sea_choice'?"),
        (["lost"], "DataError: lm-eval could not run the task"),
    ],
)
def test_mistakes_are_explained(pools: Pools, folder: str, cache: str, names: list[str], said: str) -> None:
    assert pools(1).run(f"{CASES}:refused", folder=folder, cache=cache, names=names)[0].startswith(said)


def test_a_folder_that_is_not_there(pools: Pools, folder: str, cache: str) -> None:
    (said,) = pools(1).run(f"{CASES}:refused", folder=f"{folder}/none", cache=cache, names=["x"])
    assert said == f"ConfigError: --include-path: there is no folder {folder}/none"


def test_every_rank_hears_of_a_mistake(pools: Pools, folder: str, cache: str) -> None:
    for found in pools(2).run(f"{CASES}:refused", folder=folder, cache=cache, names=["lost"]):
        assert found.startswith("DataError: lm-eval could not run the task")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megacpt.evaluate.lm_eval.find_spec", lambda _: None)
    nothing: Any = None
    with pytest.raises(SetupError, match=r"pip install 'megacpt\[eval\]'"):
        evaluate_tasks(nothing, nothing, ["x"])
