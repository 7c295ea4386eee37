from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config import CosineSchedule, InfiniteSchedule, load_run, run_from_mapping
from megacpt.config.keys import ANY, catalogue
from megacpt.config.overrides import merge, parse_overrides
from megacpt.config.yaml_text import inline
from megacpt.errors import ConfigError
from tests.config.helpers import make_run, plain_run

LEAVES = [path for path, keys in catalogue().items() if not keys[0].section]


def test_values_are_yaml() -> None:
    texts = ["optim.peak_lr=3e-4", "parallel.tensor=2", "log.tensorboard=false", "optim.clip=null", "model={layers: 2}"]
    assert [override.value for override in parse_overrides(texts)] == [3e-4, 2, False, None, {"layers": 2}]


def test_values_may_hold_equals_signs_and_spaces() -> None:
    (override,) = parse_overrides(["run=runs/lr=3e-4 b"])
    assert (override.path, override.value) == (("run",), "runs/lr=3e-4 b")


plain_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    st.dictionaries(st.text("abc", min_size=1), st.integers(), max_size=2),
)


@given(st.sampled_from(LEAVES), st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,8}", fullmatch=True), plain_values)
def test_any_key_and_value_survive(path: str, name: str, value: Any) -> None:
    key = path.replace(ANY, name)
    (override,) = parse_overrides([f"{key}={inline(value)}"])
    assert override.path == tuple(key.split("."))
    assert override.value == value


@given(st.integers(1, 10**6), st.floats(1e-9, 1.0), st.sampled_from(["float32", "bfloat16"]), st.integers(1, 64))
def test_overrides_are_as_if_written_in_the_file(seed: int, rate: float, precision: str, weight: int) -> None:
    written = plain_run()
    written["seed"], written["optim"]["peak_lr"], written["precision"] = seed, rate, precision
    written["stage"]["mixture"]["english"] = {"path": "data/english", "weight": weight}
    given = [
        f"seed={seed}",
        f"optim.peak_lr={rate!r}",
        f"precision={precision}",
        f"stage.mixture.english.weight={weight}",
    ]
    assert make_run(*given) == run_from_mapping(written)


def test_the_last_one_counts() -> None:
    assert make_run("seed=1", "seed=2").seed == 2


def test_the_given_mapping_is_left_alone() -> None:
    data = plain_run()
    before = copy.deepcopy(data)
    run_from_mapping(data, ["optim.peak_lr=1", "stage.mixture.english.weight=3", "stage.replay.share=5%", "model=tiny"])
    assert data == before


def test_short_forms_open_up() -> None:
    run = make_run("stage.mixture.english.weight=3", "stage.mixture.python=data/python")
    assert {name: (str(s.path), s.weight) for name, s in run.stage.mixture.items()} == {
        "english": ("data/english", 3),
        "python": ("data/python", 1),
    }


def test_keys_of_a_named_model() -> None:
    run = make_run("model=tiny", "model.layers=8")
    assert run.model.layers == 8
    assert run.model.hidden == make_run("model=tiny").model.hidden
    assert run.model.name == "tiny (changed)"
    assert make_run("model=tiny", "model.layers=8", "model.name=mine").model.name == "mine"


def test_another_kind_keeps_what_both_have() -> None:
    infinite = {"kind": "infinite", "warmup": "2%", "cooldown": "50%", "min_lr": "5%"}
    data = {**plain_run(), "schedule": infinite}
    run = run_from_mapping(data, ["schedule.kind=cosine"])
    assert run.schedule == CosineSchedule.model_validate({"kind": "cosine", "warmup": "2%", "min_lr": "5%"})


@pytest.mark.parametrize("order", [1, -1])
def test_keys_given_with_another_kind(order: int) -> None:
    cosine = {**plain_run(), "schedule": {"kind": "cosine", "warmup": "2%"}}
    given = ["schedule.kind=infinite", "schedule.cooldown=50%"][::order]
    expected = {"kind": "infinite", "warmup": "2%", "cooldown": "50%"}
    assert run_from_mapping(cosine, given).schedule == InfiniteSchedule.model_validate(expected)
    with pytest.raises(ConfigError, match=r"schedule\.cooldown: this key belongs to schedule\.kind infinite"):
        run_from_mapping(cosine, ["schedule.kind=linear", "schedule.cooldown=50%"][::order])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.peek_lr=3", "'optim.peek_lr=3': unknown key 'optim.peek_lr'; did you mean 'optim.peak_lr'?"),
        ("peak_lr=3", "unknown key 'peak_lr'; did you mean 'optim.peak_lr'?"),
        ("optim.tensor=3", "unknown key 'optim.tensor'; did you mean 'parallel.tensor'?"),
        ("optimizer.peak_lr=3", "unknown key 'optimizer.peak_lr'; did you mean 'optim.peak_lr'?"),
        ("model.rope.bass=3", "did you mean 'model.rope.base'?"),
        ("stage.mixture.python.wait=1", "did you mean 'stage.mixture.python.weight'?"),
        ("stage.mixture.python.weight.x=1", "unknown key 'stage.mixture.python.weight.x'"),
        ("qqq=1", "unknown key 'qqq'; `megacpt config explain` lists all keys"),
        ("=3", "unknown key ''"),
        ("optim..peak_lr=3", "did you mean 'optim.peak_lr'?"),
        (
            "optim.peak_lr",
            "'optim.peak_lr' is not a change of the configuration: write KEY=VALUE, such as optim.peak_lr=3e-4",
        ),
        ("recompute", "such as recompute=selective"),
        ("--fast", "such as optim.peak_lr=3e-4"),
        ("model=[", "'model=[': '[' is not valid YAML"),
    ],
)
def test_what_is_not_an_override(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides([text])
    assert message in str(caught.value)


def test_all_mistakes_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["optim.peek_lr=3", "seed=1", "x", "model=["])
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "'optim.peek_lr=3'",
        "'x' is not a change of the configuration",
        "'model=['",
    ]


def test_a_key_below_a_value() -> None:
    with pytest.raises(ConfigError, match=r"optim\.peak_lr: optim is 3, not a section"):
        make_run("optim=3", "optim.peak_lr=3e-4")


def test_merging_changes_neither_side() -> None:
    parent = {"optim": {"peak_lr": 1, "clip": 2}, "evaluate": {"streams": {"a": "x", "b": "y"}}, "log": {"every": 1}}
    child = {"optim": {"clip": 3}, "evaluate": {"streams": {"a": None, "c": "z"}}, "log": None}
    before = copy.deepcopy((parent, child))
    assert merge(parent, child) == {
        "optim": {"peak_lr": 1, "clip": 3},
        "evaluate": {"streams": {"b": "y", "c": "z"}},
        "log": {"every": 1},
    }
    assert (parent, child) == before


def test_overrides_of_a_file(tmp_path: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: x\nmodel: tiny\ntokenizer: bytes\nstage: {name: a, tokens: 1M, mixture: {a: d}}\n")
    run = load_run(path, ["optim.peak_lr=3e-4", "batch.sequences=2", "batch.seq_length=8"])
    assert run.tokens_per_step == 16
