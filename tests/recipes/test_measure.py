"""What is taken from the metrics of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megacpt.config import dump, run_from_mapping
from megacpt.continuation.boundary import RUN
from megacpt.errors import DataError
from megacpt.recipes.measure import RunRecord
from megacpt.recipes.recipe import Measure

LOADS = [0.9, 0.5, 0.3, 0.4, 0.2]


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    """A run of 10 steps, measured at 0, 1, 4, 8 and 10, whose two layers are 0.1 above and below the mean load."""
    config = {
        "run": str(tmp_path),
        "model": "mini-switch-penalty",
        "tokenizer": "bytes",
        "stage": {"name": "english", "tokens": 10 * 16 * 128, "mixture": {"english": "data/english"}},
        "optim": {"peak_lr": 1e-3},
        "batch": {"sequences": 16, "seq_length": 128},
    }
    (tmp_path / RUN).write_text(dump(run_from_mapping(config, source="test")))
    lines = []
    for step, load in zip((0, 1, 4, 8, 10), LOADS, strict=True):
        both = [load - 0.1, load + 0.1]
        if step:
            layers = {f"moe/layer-{n}/max_load": value / 2 for n, value in enumerate(both, 1)}
            lines.append({"kind": "train", "step": step, "loss": 3.0, "moe/balance_loss": 7.0, **layers})
        for stream, shift in (("english", 0.0), ("c", 0.05)):
            at = {"step": step, "stream": stream}
            lines.append({"kind": "eval", **at, "loss": 2.0, "bits_per_byte": 4 - step / 10 + shift})
            moved = [value + shift for value in both]
            lines.append({"kind": "routing", **at, "max_load": moved, "saturation_start": [1 - step / 20, 1.0]})
        lines.append({"kind": "information", "step": step, "streams": ["english", "c"], "information": [0.1, 0.2]})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return RunRecord.read(tmp_path)


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ({"streams": ["english", "c"]}, 3.025),
        ({"streams": ["english"], "when": "start"}, 4.0),
        ({"of": "max_load", "streams": ["english"]}, 0.2),
        ({"of": "max_load", "streams": ["english", "c"], "when": "start"}, 0.925),
        ({"of": "max_load", "streams": ["c"], "when": "highest"}, 0.55),
        ({"of": "max_load", "streams": ["english"], "when": "highest", "within": "4 steps"}, 0.5),
        ({"of": "max_load", "streams": ["english"], "when": "highest", "after": "40%"}, 0.4),
        ({"of": "max_load", "streams": ["english"], "when": "highest", "after": "1 step", "within": "4 steps"}, 0.3),
        ({"of": "saturation_start", "streams": ["english"]}, 0.75),
        ({"of": "training_max_load"}, 0.1),
        ({"of": "training_max_load", "when": "highest", "after": "10%"}, 0.2),
    ],
)
def test_measures(record: RunRecord, measure: dict[str, object], value: float) -> None:
    assert record.measured(Measure.model_validate(measure)) == pytest.approx(value)


def test_what_was_not_measured_is_said(record: RunRecord) -> None:
    between = Measure.model_validate({"streams": ["english"], "when": "highest", "after": "4 steps", "within": "50%"})
    assert record.find(between) is None
    with pytest.raises(DataError, match="has no max_load of german to take the end from"):
        record.measured(Measure(of="max_load", streams=["german"]))
