"""What a stage must ask for, and how its experts must be, where a dense checkpoint becomes a model with experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megacpt.config import ModelConfig, run_from_mapping
from megacpt.config.fixed import model_problems
from megacpt.config.upcycle import Upcycle
from megacpt.continuation.boundary import annealed_config, continued_config, first_ledger
from megacpt.continuation.ledger import Ledger
from megacpt.errors import ConfigError
from tests.config.helpers import plain_run
from tests.continuation.conftest import Finish
from tests.small import MODEL, run_config

Streams = dict[str, str]
COPY: dict[str, Any] = {"experts": 4, "top_k": 2, "renormalise": True}
SHARED: dict[str, Any] = {"experts": 4, "shared_ffn": 48}
DENSE = ModelConfig.model_validate(MODEL)


def _experts(moe: dict[str, Any], **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**MODEL, **changes, "moe": moe})


def _stage_file(folder: Path, streams: Streams, moe: dict[str, Any] | None, upcycle: str | None) -> Path:
    path = folder / "experts.yaml"
    stage: dict[str, Any] = {"name": "experts", "tokens": 512, "mixture": {"python": streams["python"]}}
    if upcycle is not None:
        stage["carry"] = {"upcycle": upcycle}
    sections = {"stage": stage, **({} if moe is None else {"model": {"moe": moe}})}
    path.write_text(json.dumps(sections))  # which is YAML too
    return path


@pytest.mark.parametrize(
    ("how", "moe"),
    [
        ("copy", COPY),
        ("copy", {**COPY, "ffn": 48, "score": "sigmoid", "every": 2, "balance": {"kind": "bias"}}),
        ("shared", SHARED),
        ("shared", {**SHARED, "ffn": 12, "top_k": 3, "scale": 2.5, "capacity": 1.25}),
    ],
)
def test_what_preserves_the_function(how: Upcycle, moe: dict[str, Any]) -> None:
    assert not list(model_problems(DENSE, _experts(moe), how))


@pytest.mark.parametrize(
    ("how", "changes", "key", "remedy"),
    [
        ("copy", {"ffn": 24}, "model.moe.ffn", "take null, which is model.ffn, 48"),
        ("copy", {"shared_ffn": 48}, "model.moe.shared_ffn", "take 0, or stage.carry.upcycle: shared"),
        ("copy", {"renormalise": False}, "model.moe.renormalise", "take true"),
        ("copy", {"scale": 2.5}, "model.moe.scale", "take 1"),
        ("copy", {"capacity": 1.0}, "model.moe.capacity", "take null"),
        ("copy", {"top_k": 1, "renormalise": False}, "model.moe.top_k", "take 2, or stage.carry.upcycle: shared"),
        ("shared", {}, "model.moe.shared_ffn", "take 48"),
        (None, {}, "model.moe", "take stage.carry.upcycle: copy or shared"),
    ],
)
def test_what_does_not_is_refused_by_key(how: Upcycle | None, changes: dict[str, Any], key: str, remedy: str) -> None:
    (problem,) = model_problems(DENSE, _experts({**COPY, **changes}), how)
    assert problem.key == key
    assert remedy in problem.text


def test_only_from_dense_to_experts() -> None:
    said = [str(problem) for problem in model_problems(_experts(COPY), DENSE)]
    assert said == ["model.moe: null: the weights were trained with experts, which cannot become one MLP again: "
                    "remove the key"]  # fmt: skip
    (again,) = model_problems(_experts(COPY), _experts(COPY), "copy")
    assert (again.key, "has experts already" in again.text) == ("stage.carry.upcycle", True)
    (nothing,) = model_problems(DENSE, DENSE, "shared")
    assert (nothing.key, "no model.moe" in nothing.text) == ("stage.carry.upcycle", True)


def test_the_rest_of_the_model_is_as_fixed_as_ever() -> None:
    assert [problem.key for problem in model_problems(DENSE, _experts(COPY, hidden=64, ffn=96), "copy")] == [
        "model.moe.ffn",
        "model.hidden",
        "model.ffn",
        "model.head_dim",
    ]
    assert [p.key for p in model_problems(_experts(COPY), _experts({**COPY, "experts": 8}))] == ["model.moe.experts"]


def test_a_stage_file(english: Path, streams: Streams, tmp_path: Path) -> None:
    config, parent = continued_config(
        english, _stage_file(tmp_path, streams, COPY, "copy"), tmp_path / "next", ["seed=9"]
    )
    record = first_ledger(config, parent).stage
    assert record.carry["upcycle"] == "copy"
    assert record.changes["stage.carry.upcycle"] == [None, "copy"]
    assert record.changes["model.moe.experts"] == [None, 4]
    for moe, upcycle, key in (
        (COPY, None, "model.moe"),
        ({**COPY, "renormalise": False}, "copy", "model.moe.renormalise"),
        (None, "copy", "stage.carry.upcycle"),
    ):
        with pytest.raises(ConfigError, match=rf"^{tmp_path}/experts.yaml.*: {key}: "):
            continued_config(english, _stage_file(tmp_path, streams, moe, upcycle), tmp_path / "next", [])
    with pytest.raises(ConfigError, match=r"stage\.carry\.upcycle: copied: this must be one of copy, shared"):
        continued_config(english, _stage_file(tmp_path, streams, COPY, "copied"), tmp_path / "next", [])


def test_the_ledger_refuses_what_the_files_did_not(english: Path, streams: Streams, tmp_path: Path) -> None:
    config = run_config(tmp_path / "next", {"python": streams["python"]}, model={"moe": COPY})
    with pytest.raises(ConfigError, match=r"^model\.moe: the weights were trained without experts"):
        first_ledger(config, english)


def test_a_first_stage_has_nothing_to_make_experts_of(streams: Streams, tmp_path: Path) -> None:
    stage = {"name": "first", "tokens": 512, "mixture": {"english": streams["english"]}, "carry": {"upcycle": "copy"}}
    with pytest.raises(ConfigError, match=r"^stage\.carry\.upcycle: copy: a first stage begins with new weights"):
        first_ledger(run_config(tmp_path / "run", {}, stage=stage, model={"moe": COPY}), None)


def test_what_follows_does_not_inherit_the_key(english: Path, streams: Streams, tmp_path: Path, finish: Finish) -> None:
    config, parent = continued_config(english, _stage_file(tmp_path, streams, COPY, "copy"), tmp_path / "next", [])
    checkpoint = finish(config, parent)
    branch, _ = annealed_config(checkpoint, "50%", tmp_path / "branch", [])
    later, _ = continued_config(checkpoint, _stage_file(tmp_path, streams, None, None), tmp_path / "later", [])
    for follower in (branch, later):
        assert follower.stage.carry.upcycle is None
        assert follower.model.moe == config.model.moe
        assert "upcycle" not in first_ledger(follower, checkpoint).stage.carry
    assert Ledger.read(checkpoint).stage.carry["upcycle"] == "copy"


def test_the_key_is_a_choice() -> None:
    carry = {"stage": {**plain_run()["stage"], "carry": {"upcycle": "sparse"}}}
    with pytest.raises(ConfigError, match=r"stage\.carry\.upcycle: sparse: this must be one of copy, shared"):
        run_from_mapping({**plain_run(), **carry})
