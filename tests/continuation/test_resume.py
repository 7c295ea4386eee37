"""What a resume may change, and the refusal that names what it may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megacpt.config import RunConfig, dump
from megacpt.continuation.boundary import RUN, create_run, first_ledger, started
from megacpt.continuation.ledger import Ledger
from megacpt.continuation.resume import check_resume, find_data
from megacpt.data.train_tokenizer import train_tokenizer
from megacpt.errors import ConfigError
from tests.continuation.conftest import Finish, stage
from tests.small import STEP, run_config

Streams = dict[str, str]
COSINE = {"kind": "cosine", "warmup": "1 steps"}
# What is changed, and the lines that the refusal says it with.
CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "seed": ({"seed": 6}, ["seed: 5 -> 6"]),
    "model": (
        {"model": {"layers": 3, "rope": {"scaling": {"kind": "linear", "factor": 2}}}},
        [
            "model.layers: 2 -> 3",
            "model.rope.scaling.kind: (none) -> linear",
            "model.rope.scaling.factor: (none) -> 2.0",
        ],
    ),
    "stage": ({"stage": {"name": "other"}}, ["stage.name: first -> other"]),
    "weights": (
        {"stage": {"mixture": {"english": {"path": "unread", "weight": 2}, "c": {"path": "unread"}}}},
        ["stage.mixture.english.weight: 1.0 -> 2.0", "stage.mixture.c.weight: (none) -> 1.0"],
    ),
    "schedule": (
        {"schedule": {"kind": "constant"}},
        ["schedule.warmup: 2 steps -> 1%", "schedule.kind: infinite -> constant"],
    ),
    "optim": (
        {"optim": {"weight_decay": 0.2, "multipliers": {"mlp": {"lr": 0.5}}}},
        ["optim.weight_decay: 0.1 -> 0.2", "optim.multipliers.mlp.lr: 1.0 -> 0.5"],
    ),
    "precision": ({"precision": "bfloat16"}, ["precision: float32 -> bfloat16"]),
    "batch": ({"batch": {"sequences": 16, "seq_length": 8}}, ["batch.sequences: 8 -> 16", "batch.seq_length: 16 -> 8"]),
}


@pytest.fixture
def run(english: Path) -> tuple[Path, Ledger]:
    """A run folder and the ledger at its start."""
    folder = english.parent.parent
    start = started(folder)
    assert start is not None
    return folder, start


def _config(folder: Path, streams: Streams, steps: int = 8, **changes: Any) -> RunConfig:
    return run_config(folder, {"english": streams["english"]}, steps, **changes)


def _refusal(config: RunConfig, start: Ledger) -> list[str]:
    """The lines of what changed, in the refusal of a resume."""
    with pytest.raises(ConfigError) as error:
        check_resume(config, start, None)
    first, *lines, last = str(error.value).splitlines()
    assert first == f"{config.run} holds a run with other settings. A run goes on exactly as it began; changed:"
    assert f"`megacpt continue {config.run} STAGE.yaml --run NEW_FOLDER`" in last
    return [line.removeprefix("  ") for line in lines]


@pytest.mark.parametrize("part", CHANGES)
def test_a_resume_refuses_by_name_what_changes_the_numbers(
    run: tuple[Path, Ledger], streams: Streams, part: str
) -> None:
    folder, start = run
    changes, lines = CHANGES[part]
    assert _refusal(_config(folder, streams, **changes), start) == lines


@pytest.mark.parametrize("part", ["seed", "model", "optim", "precision", "batch"])
def test_editing_the_saved_configuration_is_no_way_round(run: tuple[Path, Ledger], streams: Streams, part: str) -> None:
    folder, start = run
    changes, lines = CHANGES[part]
    edited = _config(folder, streams, **changes)
    (folder / RUN).write_text(dump(edited))
    assert _refusal(edited, start) == lines


def test_nor_for_the_length_of_a_stage_with_a_horizon(streams: Streams, tmp_path: Path) -> None:
    config, edited = (_config(tmp_path / "run", streams, steps, schedule=COSINE) for steps in (8, 20))
    start = first_ledger(config, None)
    create_run(config, start)
    (tmp_path / "run" / RUN).write_text(dump(edited))
    assert _refusal(edited, start) == [f"stage.tokens: {8 * STEP} -> {20 * STEP}"]


def test_a_resume_names_all_that_changed(run: tuple[Path, Ledger], streams: Streams) -> None:
    config = _config(run[0], streams, seed=6, precision="bfloat16", batch={"sequences": 16})
    assert _refusal(config, run[1]) == ["seed: 5 -> 6", "batch.sequences: 8 -> 16", "precision: float32 -> bfloat16"]


def test_a_resume_names_the_stream_whose_content_is_another(run: tuple[Path, Ledger], streams: Streams) -> None:
    folder, start = run
    english, python = (
        json.loads((Path(streams[name]) / "stream.json").read_text())["content_hash"][:12]
        for name in ("english", "python")
    )
    assert _refusal(run_config(folder, {"english": streams["python"]}, 8), start) == [
        f"stage.mixture.english: the stream {streams['english']} with the content hash {english} -> "
        f"{streams['python']} with {python}"
    ]


def test_a_resume_names_another_tokenizer(run: tuple[Path, Ledger], streams: Streams, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789\n" * 50)
    train_tokenizer([text], 300, tmp_path / "pieces")
    (line,) = _refusal(_config(run[0], streams, tokenizer=str(tmp_path / "pieces")), run[1])
    assert line.startswith("tokenizer: bytes (fingerprint ")
    assert f" -> {tmp_path / 'pieces'} (" in line


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": {"tensor": 2, "sequence": True}},
        {"parallel": {"distributed_optimizer": True}},
        {"batch": {"microbatch": 8}},
        {"recompute": "full"},
        {"log": {"every": "3 steps", "tensorboard": True}},
        {"checkpoint": {"every": "1 steps", "keep_last": 1, "asynchronous": True}},
        {"evaluate": {"every": "2 steps", "tokens": "1k"}},
    ],
)
def test_a_resume_takes_another_layout_and_other_habits(
    run: tuple[Path, Ledger], streams: Streams, changes: dict[str, Any]
) -> None:
    check_resume(_config(run[0], streams, **changes), run[1], None)


def test_a_stage_without_a_horizon_may_become_longer(
    run: tuple[Path, Ledger], streams: Streams, tmp_path: Path
) -> None:
    check_resume(_config(run[0], streams, steps=20), run[1], None)
    longer = _config(run[0], streams, steps=20, stage={"tokens": 20 * STEP, "name": "x"})
    assert _refusal(longer, run[1]) == ["stage.name: first -> x"]
    cosine = _config(tmp_path / "cosine", streams, schedule=COSINE)
    start = first_ledger(cosine, None)
    create_run(cosine, start)
    longer = _config(tmp_path / "cosine", streams, steps=20, schedule=COSINE)
    assert _refusal(longer, start) == [f"stage.tokens: {8 * STEP} -> {20 * STEP}"]


def test_a_resume_from_another_checkpoint_is_refused(
    english: Path, streams: Streams, tmp_path: Path, finish: Finish
) -> None:
    config = stage(tmp_path / "next", {"python": streams["python"]})
    start = first_ledger(config, english)
    create_run(config, start)
    other = finish(run_config(tmp_path / "other", {"c": streams["c"]}))
    with pytest.raises(ConfigError, match=r"started from another checkpoint \(.*english.*\); give the new stage a fol"):
        check_resume(config, start, other)


def test_a_run_goes_on_where_its_data_is(
    run: tuple[Path, Ledger], streams: Streams, tmp_path: Path, finish: Finish
) -> None:
    folder, start = run
    moved = tmp_path / "another disk" / "english"
    moved.parent.mkdir()
    moved.symlink_to(streams["english"])
    config = run_config(folder, {"english": str(moved)}, 8)
    check_resume(config, start, None)
    elsewhere = find_data(start.with_stage(run="/x"), run_config(folder, {"english": str(tmp_path / "gone")}, 8))
    assert elsewhere.stage.plan.sources[0].path == str(tmp_path / "gone")
    assert elsewhere.id == start.id
    assert _refusal(run_config(folder, {"renamed": streams["english"]}, 8), start) == [
        "stage.mixture.english.weight: 1.0 -> (none)",
        "stage.mixture.renamed.weight: (none) -> 1.0",
    ]
    replaying = stage(tmp_path / "next", {"python": streams["python"]}, replay={"share": "25%"})
    finish(replaying, folder / "checkpoints" / "step-00000008")
    second = started(tmp_path / "next")
    assert second is not None
    assert find_data(second, replaying) == second
