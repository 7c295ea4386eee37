"""What a stage changes against the one that it continues, by key."""

from __future__ import annotations

from pathlib import Path

import pytest

from megacpt.continuation.boundary import first_ledger
from megacpt.continuation.changes import differences, flat
from megacpt.errors import ConfigError
from tests.continuation.conftest import stage

Streams = dict[str, str]
LONGER = {"max_seq_length": 256, "rope": {"base": 500000.0, "scaling": {"kind": "linear", "factor": 4.0}}}


def test_sections_by_dotted_key() -> None:
    assert flat({"a": {"b": 1, "c": {"d": [1, {"e": 2}]}}, "f": None, "g": {}}) == {
        "a.b": 1,
        "a.c.d": [1, {"e": 2}],
        "f": None,
    }


def test_keys_of_one_side() -> None:
    before = {"x.kind": "a", "x.only_a": 1, "x.both": 1, "m.s.weight": 1.0, "m.s.order": "shuffled", "left": None}
    after = {"x.kind": "b", "x.only_b": 1, "x.both": 2, "m.t.weight": 2.0, "m.t.order": "shuffled", "new": 3}
    assert differences(before, after) == {
        "x.kind": ("a", "b"),
        "x.both": (1, 2),
        "m.s.weight": (1.0, None),
        "m.t.weight": (None, 2.0),
        "new": (None, 3),
    }
    assert differences(before, before) == {}


def test_a_stage_records_what_it_changes(english: Path, streams: Streams, tmp_path: Path) -> None:
    config = stage(
        tmp_path / "next",
        {"english": {"path": streams["english"], "weight": 3}, "python": streams["python"]},
        model={**LONGER},
        batch={"sequences": 4, "seq_length": 32},
        optim={"freeze": ["embeddings"]},
        parallel={"tensor": 2},
        schedule={"kind": "constant"},
        evaluate={"every": "1 steps"},
    )
    assert first_ledger(config, english).stage.changes == {
        "model.max_seq_length": [64, 256],
        "model.rope.base": [10000.0, 500000.0],
        "model.rope.scaling.kind": [None, "linear"],
        "model.rope.scaling.factor": [None, 4.0],
        "stage.mixture.english.weight": [1.0, 3.0],
        "stage.mixture.python.weight": [None, 1.0],
        "schedule.warmup": ["2 steps", "1%"],
        "schedule.kind": ["infinite", "constant"],
        "optim.freeze": [[], ["embeddings"]],
        "batch.sequences": [8, 4],
        "batch.seq_length": [16, 32],
    }


def test_where_streams_are_is_no_change(english: Path, streams: Streams, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(streams["english"])
    here, there = (
        first_ledger(stage(tmp_path / "next", {"english": str(path)}), english) for path in (streams["english"], moved)
    )
    assert here.stage.changes == {}
    assert here.id == there.id


@pytest.mark.parametrize(
    ("model", "lines"),
    [
        (
            {"layers": 3},
            ["model.layers: 3: a stage cannot change this, the weights were trained with 2: it decides how "],
        ),
        (
            {"norm_eps": 1e-6, "rope": {"share": 0.5}},
            [
                "model.norm_eps: 1e-06: a stage cannot change this, the weights were trained with 1e-05: it decides",
                "model.rope.share: 0.5: a stage cannot change this, the weights were trained with 1.0: it decides",
            ],
        ),
        ({"qk_norm": True}, ["model.qk_norm: True: a stage cannot change this, the weights were trained with False"]),
    ],
)
def test_what_a_stage_cannot_change_of_its_model(
    english: Path, streams: Streams, tmp_path: Path, model: dict[str, object], lines: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        first_ledger(stage(tmp_path / "next", {"python": streams["python"]}, model=model), english)
    said = str(error.value).splitlines()
    assert [line[: len(start)] for line, start in zip(said, lines, strict=True)] == lines
