from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megacpt.errors import CheckpointError
from megacpt.report.record import load_run
from tests.report.lab import STEP, Lab, save, write_metrics

CURVES = {"english": (8.0, 2.0), "python": (5.0, 4.0)}


def test_a_run_is_read_from_its_folder(lab: Lab) -> None:
    record = load_run(lab.run("first", "english", CURVES, steps=20))
    assert (record.name, record.start, record.end, record.complete) == ("first", 0, 20 * STEP, True)
    assert [point.tokens for point in record.train] == [STEP * step for step in range(1, 21)]
    assert record.train[0].tokens_per_second == 20_001.0
    assert set(record.evaluations) == {"english", "python"}
    english = record.evaluations["english"]
    assert (english[0].tokens, english[0].bits_per_byte) == (0, 8.0)
    assert (english[-1].tokens, english[-1].bits_per_byte) == (20 * STEP, 2.0)
    assert record.wall_seconds == 64.0


def test_a_later_stage_counts_the_tokens_of_the_lineage(lab: Lab) -> None:
    first = lab.run("first", "english", CURVES, steps=20)
    record = load_run(lab.run("second", "python", CURVES, first, steps=10, stopped_at=4))
    assert (record.start, record.end, record.complete) == (20 * STEP, 24 * STEP, False)


def test_a_run_without_a_checkpoint_or_metrics_yet_is_read_from_its_start(lab: Lab) -> None:
    folder = lab.run("first", "english", CURVES, stopped_at=0)
    (folder / "metrics.jsonl").unlink()
    record = load_run(folder)
    assert (record.train, record.evaluations, record.end) == ((), {}, 0)


def test_metrics_reach_further_than_the_newest_checkpoint(lab: Lab) -> None:
    folder = lab.run("first", "english", CURVES, steps=20, stopped_at=10)
    (folder / "checkpoints" / f"step-{10:08d}").rename(folder / "checkpoints" / ".step-00000010.partial")
    record = load_run(folder)
    assert (record.ledger.tokens, record.end) == (0, 10 * STEP)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_a_kill_cut_off_is_passed_over(cut: int, lab: Lab) -> None:
    folder = lab.run("first", "english", CURVES, steps=5)
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[: -cut - 1])
    record = load_run(folder)
    assert len(record.train) == 4
    assert record.unreadable == 0


def test_a_last_line_without_its_line_end_counts(lab: Lab) -> None:
    folder = lab.run("first", "english", CURVES, steps=5)
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-1])
    assert len(load_run(folder).train) == 5


@pytest.mark.parametrize(
    "line", ['{"kind": "tra{"kind": "train"}', "[1]", '{"step": 1}', '{"kind": "train", "step": 3}']
)
def test_bad_lines_in_the_midst_are_counted(line: str, lab: Lab) -> None:
    folder = lab.run("first", "english", CURVES, steps=5)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(f"{line}\n{metrics.read_text()}")
    record = load_run(folder)
    assert (len(record.train), record.unreadable) == (5, 1)


def test_a_step_made_again_after_a_kill_counts_once(lab: Lab) -> None:
    folder = lab.run("first", "english", CURVES, steps=5)
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    again = [{**line, "loss": 7.0} for line in lines if line["step"] == 3 and line["kind"] == "train"]
    write_metrics(folder, [*lines, *again])
    record = load_run(folder)
    assert [point.tokens for point in record.train] == [STEP * step for step in range(1, 6)]
    assert record.train[2].loss == 7.0


def test_losses_that_are_not_finite_are_kept(lab: Lab) -> None:
    folder = lab.run("first", "english", CURVES, steps=5)
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    write_metrics(folder, [{**line, "loss": math.nan} for line in lines])
    assert all(math.isnan(point.loss) for point in load_run(folder).train)


def test_unknown_kinds_of_lines_are_for_other_readers(lab: Lab) -> None:
    folder = lab.run("first", "english", CURVES, steps=5)
    metrics = folder / "metrics.jsonl"
    metrics.write_text('{"kind": "weather", "step": 1, "lineage_tokens": 9, "rain": 1.0}\n' + metrics.read_text())
    record = load_run(folder)
    assert (len(record.train), record.unreadable) == (5, 0)


def test_the_newest_checkpoint_says_what_was_read(lab: Lab) -> None:
    folder = lab.run("first", "english", CURVES, steps=20, stopped_at=10)
    save(folder, load_run(folder).ledger, 12)
    assert load_run(folder).ledger.stage.steps == 12


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing holds no run: a run folder has start\.json"):
        load_run(tmp_path / "nothing")
