from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megacpt.continuation.ledger import LEDGER
from megacpt.continuation.origin import converted_ledger
from megacpt.data.tokenizer import load_tokenizer
from megacpt.report import write_report
from megacpt.report.lineage import chain
from megacpt.report.measures import measures
from megacpt.report.outcome import curve, outcome, readings
from megacpt.report.record import load_run
from tests.report.lab import STEP, Lab, write_metrics

Family = dict[str, Path]


def main_line(family: Family) -> list[Path]:
    return [family[name] for name in ("english", "python", "python-release")]


def test_the_matrix_holds_the_loss_after_each_stage(family: Family) -> None:
    found = outcome(chain(main_line(family)))
    assert found.stages == ("english", "python", "release")
    assert found.streams == ("english", "python", "c")
    assert found.homes == {"english": 0, "python": 1}
    assert found.start == {"english": 8.1, "python": 5.2, "c": 5.6}
    assert [row["english"] for row in found.losses] == pytest.approx([2.3, 2.42, 2.36])
    assert [row["python"] for row in found.losses] == pytest.approx([4.4, 1.975, 1.84])
    assert found.forgotten[-1] == pytest.approx({"english": 0.06, "python": -0.135})
    assert found.changed[1] == pytest.approx({"english": 0.12})
    assert found.changed[2] == pytest.approx({"english": 0.06, "python": -0.135})
    assert (found.before("english"), found.before("python")) == (8.1, 4.4)
    assert (found.own("english"), found.own("python"), found.own("c")) == (2.3, pytest.approx(1.975), None)


def test_a_stream_that_a_stage_did_not_measure_is_taken_from_the_start_of_the_next(lab: Lab) -> None:
    first = lab.run("first", "english", {"english": (8.0, 2.0)})
    second = lab.run("second", "python", {"python": (4.5, 2.0), "english": (2.0, 2.5)}, first)
    found = outcome(chain([first, second]))
    assert found.losses[0] == {"english": 2.0, "python": 4.5}
    assert found.before("python") == 4.5


def test_a_measurement_later_in_the_next_stage_is_not_taken_for_one_at_its_start(lab: Lab) -> None:
    first = lab.run("first", "english", {"english": (8.0, 2.0)})
    second = lab.run("second", "python", {"python": (4.5, 2.0)}, first)
    lines = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    write_metrics(second, [line for line in lines if line["step"] > 0])
    assert outcome(chain([first, second])).before("python") is None


def test_a_curve_runs_through_all_stages(family: Family) -> None:
    points = curve(chain(main_line(family)), "english")
    tokens = [point.tokens for point in points]
    assert tokens == sorted(tokens)
    assert (tokens[0], tokens[-1]) == (0, 45 * STEP)


def test_readings_add_up_replay_under_the_name_of_the_stream(family: Family) -> None:
    line = chain(main_line(family))
    english, python = readings(line)
    assert (english.name, python.name) == ("english", "python")
    assert english.tokens == (20 * STEP, 5 * STEP, 5 * STEP // 4)
    assert english.shares == pytest.approx((1.0, 0.25, 0.25))
    assert english.replayed == (False, True, True)
    assert python.tokens == (0, 15 * STEP, 15 * STEP // 4)
    assert python.replayed == (False, False, False)
    assert english.passes == pytest.approx(sum(english.tokens) / 2000)
    assert sum(english.tokens) + sum(python.tokens) == line[-1].ledger.tokens


def test_a_converted_model_has_known_what_external_replay_stands_for(lab: Lab, tmp_path: Path) -> None:
    other = lab.run("other", "english", {"english": (8.0, 2.0)})
    config = load_run(other).config
    origin = tmp_path / "converted"
    origin.mkdir()
    shutil.copy(other / "run.yaml", origin)
    tokenizer = load_tokenizer("bytes")
    (origin / LEDGER).write_text(converted_ledger(config.model, tokenizer, "from-hf", {"model": "m"}).to_json())
    curves = {"english": (2.0, 2.25), "python": (4.0, 2.0)}
    replay = {"share": "25%", "policy": "external", "streams": {"english": str(lab.folder / "english")}}
    run = lab.run("second", "python", curves, origin, stage={"replay": replay}, schedule={"warmup": "10%"})
    line = chain([run])
    found = outcome(line)
    assert found.homes == {"english": -1, "python": 0}
    assert found.forgotten == [{"english": 0.25}]
    assert [(gap.stage, gap.stream) for gap in measures(line, found).gaps] == [(0, "english")]
    assert [reading.name for reading in readings(line)] == ["python", "replay-english"]
    text = write_report([run], tmp_path / "report.html").read_text()
    assert "from-hf" in text  # in the tree
    assert "Runs of earlier stages are not where they were" not in text
