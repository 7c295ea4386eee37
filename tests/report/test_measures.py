from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megacpt.report.lineage import chain
from megacpt.report.measures import Measures, measures
from megacpt.report.numbers import summary
from megacpt.report.outcome import outcome
from tests.report.lab import STEP, Lab, write_metrics

# Bits a byte by stream, then step of the stage. English is of the first stage, Python of the second, C of the third.
FIRST = {"english": {0: 8.0, 10: 2.0}, "python": {0: 5.0, 10: 4.0}, "c": {0: 6.0, 10: 5.0}}
SECOND = {"english": {0: 2.0, 1: 2.5, 2: 3.0, 4: 2.5, 8: 2.0, 10: 2.25}, "python": {0: 4.0, 10: 1.5}, "c": {10: 4.0}}
THIRD = {"english": {0: 2.25, 1: 2.5, 10: 2.75}, "python": {0: 1.5, 1: 1.25, 10: 1.25}, "c": {0: 4.0, 10: 1.0}}


def line(lab: Lab) -> list[Path]:
    parent, runs = None, []
    for name, losses in (("english", FIRST), ("python", SECOND), ("c", THIRD)):
        parent = lab.run(name, name, {name: (1.0, 1.0)}, parent, steps=10)
        before = 10 * len(runs) * STEP
        write_metrics(parent, [_line(s, n, before, bits) for s, values in losses.items() for n, bits in values.items()])
        runs.append(parent)
    return runs


def _line(stream: str, step: int, before: int, bits: float) -> dict[str, object]:
    tokens = step * STEP
    place = {"step": step, "tokens": tokens, "lineage_tokens": before + tokens}
    return {"kind": "eval", **place, "stream": stream, "loss": bits * math.log(2), "bits_per_byte": bits}


def measured(runs: list[Path]) -> Measures:
    found = chain(runs)
    return measures(found, outcome(found))


def test_every_boundary_is_measured_for_the_older_streams(lab: Lab) -> None:
    gaps = {(gap.stage, gap.stream): gap for gap in measured(line(lab)).gaps}
    assert list(gaps) == [(1, "english"), (2, "english"), (2, "python")]
    first = gaps[1, "english"]
    assert (first.gap.depth, first.gap.peak, first.gap.duration) == pytest.approx((1.0, 2, 7.2))
    assert (first.gap.area, first.gap.lasting) == pytest.approx((3.46, 0.25))
    assert first.duration_tokens == pytest.approx(7.2 * STEP)
    assert [point.step for point in first.points] == [10, 11, 12, 14, 18, 20]
    assert gaps[2, "english"].gap.depth == gaps[2, "python"].gap.depth == 0.0
    assert (gaps[2, "english"].gap.lasting, gaps[2, "python"].gap.lasting) == (0.5, -0.25)


def test_worst_cases_and_windows(lab: Lab) -> None:
    found = measured(line(lab))
    assert {stream: (worst.bits_per_byte, worst.tokens) for stream, worst in found.worst.items()} == {
        "english": (3.0, 12 * STEP),
        "python": (1.25, 21 * STEP),
    }
    assert found.worst_case == pytest.approx((3.0 + 1.25 + 1.0) / 3)  # C was not measured since its own stage
    assert {stream: swing.rise for stream, swing in found.windows[8].items()} == {"english": 1.0, "python": 0.0}
    assert {stream: swing.fall for stream, swing in found.windows[8].items()} == {"english": 1.0, "python": 0.25}
    assert found.windows[64]["c"].fall == 5.0


def test_what_a_line_comes_down_to(lab: Lab) -> None:
    runs = chain(line(lab))
    numbers = summary(outcome(runs), measures(runs, outcome(runs)))
    assert numbers == pytest.approx(
        {
            "average_loss": (2.75 + 1.25 + 1.0) / 3,
            "average_forgetting": (0.75 - 0.25) / 2,
            "maximum_forgetting": 0.75,
            "backward_transfer": -(0.75 - 0.25) / 2,
            "forward_transfer": (1.0 + 2.0) / 2,
            "learned": (6.0 + 2.5 + 3.0) / 3,
            "worst_case_loss": 5.25 / 3,
            "deepest_gap": 1.0,
            "windowed_forgetting_8": 0.5,
            "windowed_plasticity_8": (1.0 + 0.25) / 2,
            "windowed_forgetting_64": (1.0 + 0.0 + 0.0) / 3,
            "windowed_plasticity_64": (6.0 + 3.75 + 5.0) / 3,
            "windowed_forgetting_512": (1.0 + 0.0 + 0.0) / 3,
            "windowed_plasticity_512": (6.0 + 3.75 + 5.0) / 3,
        }
    )


def test_a_boundary_that_was_not_measured_is_taken_from_the_end_of_the_stage_before(lab: Lab) -> None:
    runs = line(lab)
    lines = [json.loads(text) for text in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    write_metrics(runs[1], [entry for entry in lines if entry["step"]])
    (gap, *_) = measured(runs).gaps
    assert (gap.stage, gap.stream, gap.gap.before, gap.gap.depth) == (1, "english", 2.0, 1.0)


def test_a_boundary_that_nobody_measured_is_left_out(lab: Lab) -> None:
    runs = line(lab)
    lines = [json.loads(text) for text in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    write_metrics(runs[1], [entry for entry in lines if 0 < entry["step"] < 10])
    write_metrics(runs[0], [entry for entry in map(json.loads, _text(runs[0])) if entry["step"] < 10])
    assert {gap.stage for gap in measured(runs).gaps} == {2}


def _text(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def test_streams_of_runs_that_are_gone_are_older_ones(lab: Lab) -> None:
    runs = chain(line(lab)[1:])
    found = outcome(runs)
    assert found.homes == {"english": -1, "python": 0, "c": 1}
    assert found.forgotten[-1] == {"english": 0.75, "python": -0.25}  # as with the first run: its end is known
    assert found.changed[-1] == {"english": 0.75, "python": -0.25}
    assert (found.before("english"), found.own("english")) == (None, 2.0)
    assert [(gap.stage, gap.stream) for gap in measures(runs, found).gaps] == [
        (0, "english"),
        (1, "english"),
        (1, "python"),
    ]
