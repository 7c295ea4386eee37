from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megacpt.report import write_report
from tests.report.lab import STEP, Lab, write_metrics

Family = dict[str, Path]


def document(runs: list[Path], folder: Path, **options: Any) -> dict[str, Any]:
    path = folder / "deep" / "report.json"
    write_report(runs, folder / "report.html", json_out=path, **options)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    return found


def test_the_document_says_what_the_page_shows(family: Family, tmp_path: Path) -> None:
    found = document([family["python-release"]], tmp_path, compare={"replay 0 %": [family["python-0-release"]]})
    assert (found["format"], found["title"]) == (1, "english → python → release")
    assert [stage["name"] for stage in found["stages"]] == ["english", "python", "release"]
    assert [stage["start"] for stage in found["stages"]] == [0, 20 * STEP, 40 * STEP]
    assert found["homes"] == {"english": 0, "python": 1}
    assert found["matrix"][1]["english"] == pytest.approx(2.42)
    assert found["summary"]["average_forgetting"] == pytest.approx((0.06 - 0.135) / 2)
    assert found["compare"]["replay 0 %"]["summary"]["maximum_forgetting"] == pytest.approx(0.55)
    assert [(gap["stage"], gap["stream"]) for gap in found["gaps"]] == [(1, "english"), (2, "english"), (2, "python")]
    assert found["held_out"]["english"][0] == [0, 0, 8.1]
    assert found["held_out"]["english"][-1] == [45, 45 * STEP, pytest.approx(2.36)]
    assert len(found["training"]) == 45
    assert found["mixture"][1]["streams"] == ["python", "english"]
    assert found["mixture"][1]["points"][0] == [20 * STEP, [0.75, 0.25]]
    assert found["read"][0]["name"] == "english"
    (english,) = found["lineage"]
    assert [Path(child["run"]).name for child in english["children"]] == ["python", "python-0"]
    assert english["id"] == found["stages"][0]["id"]


def test_numbers_that_are_not_finite_are_null(lab: Lab, tmp_path: Path) -> None:
    run = lab.run("first", "english", {"english": (8.0, 2.0)}, steps=5)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_metrics(run, [{**line, "bits_per_byte": math.nan} if line["step"] == 5 else line for line in lines])
    found = document([run], tmp_path)
    assert found["matrix"] == [{"english": None}]
    assert found["held_out"]["english"][-1] == [5, 5 * STEP, None]
