from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config import AnnealSchedule, RunConfig, dump, load_model, load_run, overlay, run_from_mapping
from megacpt.config.yaml_text import parse_document
from megacpt.errors import ConfigError
from tests.config.helpers import make_run

FILE = """\
run: runs/english
model: {layers: 4, hidden: 128, ffn: 352, heads: 8, kv_heads: 4}
tokenizer: bytes
stage:
  name: english
  tokens: 20M
  mixture:
    english: data/english
schedule:
  kind: infinite
  warmup: 1%
optim:
  peak_lr: 3e-4
  weight_decay: 0.1
batch:
  sequences: 32
  seq_length: 256
"""


def write(folder: Path, text: str = FILE) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def reload(config: RunConfig) -> RunConfig:
    return run_from_mapping(parse_document(dump(config), "dump").data)


@pytest.mark.parametrize(
    ("right", "wrong", "line", "message"),
    [
        ("peak_lr", "peek_lr", 13, "optim.peek_lr: unknown key; did you mean 'optim.peak_lr'?"),
        ("peak_lr", "lr", 13, "optim.lr: unknown key"),
        ("weight_decay", "wd", 14, "optim.wd: unknown key"),
        ("optim:", "optimiser:", 12, "optimiser: unknown key; did you mean 'optim'?"),
        ("batch:", "bach:", 15, "bach: unknown key; did you mean 'batch'?"),
        ("seq_length", "seqlen", 17, "batch.seqlen: unknown key; did you mean 'batch.seq_length'?"),
        ("warmup: 1%", "warm_up: 1%", 11, "schedule.warm_up: unknown key; did you mean 'schedule.warmup'?"),
        ("warmup: 1%", "warmup: 100", 11, "schedule.warmup: 100: the unit is missing: write '100 steps', '100 tokens'"),
        ("warmup: 1%", "warmup: 3 epochs", 11, "schedule.warmup: 3 epochs: unknown unit 'epochs': write a duration"),
        ("warmup: 1%", "tensor: 2", 11, "schedule.tensor: unknown key; did you mean 'parallel.tensor'?"),
        ("warmup: 1%", "shape: cosine", 11, "schedule.shape: this key belongs to schedule.kind anneal, not to"),
        ("kind: infinite", "kind: infinit", 10, "schedule.kind: infinit: this must be one of constant, linear, cosine"),
        ("20M", "20X", 6, "stage.tokens: 20X: unknown unit 'X': write a number of tokens, such as 20M"),
        ("20M", "0", 6, "stage.tokens: 0: this must be at least one token"),
        ("20M", "[20M]", 6, "stage.tokens: a section or list: this must be a number of tokens"),
        ("name: english", "name: two words", 5, "stage.name: two words is not a name: it may hold letters"),
        ("name: english", "name: 2024", 5, "stage.name: 2024: this must be text; put it in quotes"),
        ("    english: data", "    wiki.en: data", 8, "stage.mixture.wiki.en: wiki.en is not a name"),
        ("    english: data/english", "    english: 5", 8, "stage.mixture.english: 5: this must be a section"),
        ("    english: data/english", "    english: {weight: 1}", 8, "stage.mixture.english.path: missing"),
        (
            "peak_lr: 3e-4",
            "peak_lr: fast",
            13,
            "optim.peak_lr: fast: this must be a number; write for example `peak_lr: 3e-4`",
        ),
        ("peak_lr: 3e-4", "peak_lr: true", 13, "optim.peak_lr: true: this must be a number, not true or false"),
        ("peak_lr: 3e-4", "beta1: 0.9", 12, "optim.peak_lr: missing: write for example `peak_lr: 3e-4`"),
        ("sequences: 32", "sequences: 32.5", 16, "batch.sequences: 32.5: this must be a whole number"),
        ("sequences: 32", "sequences: -1", 16, "batch.sequences: -1: this must be at least 1"),
        ("layers: 4", "layer: 4", 2, "model.layer: unknown key; did you mean 'model.layers'?"),
        ("heads: 8", "heads: 7", 2, "model.heads: 7 does not divide hidden, which is 128: take 1, 2, 4 or 8"),
        ("run: runs", "rum: runs", 1, "rum: unknown key; did you mean 'run'?"),
    ],
)
def test_typos(tmp_path: Path, right: str, wrong: str, line: int, message: str) -> None:
    path = write(tmp_path, FILE.replace(right, wrong, 1))
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert any(found.startswith(f"{path}:{line}: {message}") for found in str(caught.value).splitlines())


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    wrong = FILE.replace("peak_lr", "peek_lr").replace("20M", "20X").replace("32", "many")
    path = write(tmp_path, wrong)
    with pytest.raises(ConfigError) as caught:
        load_run(path, ["precision=float16"])
    assert sorted(line.split(": ")[1] for line in str(caught.value).splitlines()) == [
        "batch.sequences",
        "optim.peak_lr",
        "optim.peek_lr",
        "precision",
        "stage.tokens",
    ]


def test_overrides_say_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^command line: precision: float16: this must be one of float32, bfloat16; "
    ):
        load_run(write(tmp_path), ["precision=float16"])


def test_what_follows_from_a_mistake_is_not_listed(tmp_path: Path) -> None:
    path = write(tmp_path, FILE.replace("heads: 8", "heads: 0"))
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(caught.value) == f"{path}:2: model.heads: 0: this must be at least 1"


def test_a_stage_file_is_recognised(tmp_path: Path) -> None:
    path = write(tmp_path, "stage: {name: a, tokens: 1M, mixture: {a: data/a}}\n")
    with pytest.raises(ConfigError, match=r"If this is a stage file: it is used with `megacpt continue "):
        load_run(path)


def test_models_by_name_path_and_keys(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("layers: 2\nhidden: 64\nffn: 96\nheads: 4\n")
    assert load_model(str(own)) == load_model(own)
    assert load_model(own).name == "own"
    assert load_model("tiny").name == "tiny"
    for text, name in ((str(own), "own"), ("tiny", "tiny")):
        run = load_run(write(tmp_path, FILE.replace("{layers: 4, hidden: 128, ffn: 352, heads: 8, kv_heads: 4}", text)))
        assert run.model == load_model(text)
        assert run.model.name == name


def test_mistakes_in_a_model_file_point_there(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("layers: 2\nhidden: 64\nfnn: 96\nheads: 4\n")
    for load in (lambda: load_model(own), lambda: make_run(f"model={own}")):
        with pytest.raises(ConfigError) as caught:
            load()
        assert f"{own}:3: model.fnn: unknown key; did you mean 'model.ffn'?" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tiney", "there is no model 'tiney'; did you mean 'tiny'?"),
        ("models/tiny.yaml", "models/tiny.yaml does not exist"),
        ("[1]", "model: a section or list: this must be a section"),
    ],
)
def test_models_that_are_not_there(model: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_run(f"model={model}")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=llama3-8b", "model.rope.scaling={kind: llama3}"],
        ["stage.kind=anneal", "schedule={kind: anneal, min_lr: 3.0e-5}"],
        ["schedule={kind: wsd, warmup: 500 steps, decay: 2M tokens}"],
        ["stage.tokens=1.5B", "stage.replay.share=0.25", "checkpoint.keep_every=5M tokens", "optim.clip=null"],
        ["stage.mixture.no=data/no", "evaluate.streams={on: x, '2024': y}", "run=3e-4", "tokenizer='~/a: b'"],
    ],
)
def test_what_is_dumped_loads_back(overrides: list[str]) -> None:
    if any(text.startswith("run=") for text in overrides):
        overrides = [text.replace("run=3e-4", "run='3e-4'") for text in overrides]
    run = make_run(*overrides)
    assert reload(run) == run
    assert dump(reload(run)) == dump(run)


@given(
    st.integers(1, 10**12).map(str) | st.sampled_from(["20M", "1.5B", "64Ki"]),
    st.decimals(0, 99, places=2).map(lambda n: f"{n}%") | st.floats(0, 0.99),
    st.floats(1e-6, 1e-2),
    st.integers(1, 10**6).map(lambda n: f"{n} steps") | st.decimals("0.01", 100, places=2).map(lambda n: f"{n}%"),
)
def test_any_quantities_survive_a_dump(tokens: str, share: Any, rate: float, every: str) -> None:
    run = make_run(
        f"stage.tokens={tokens}", f"stage.replay.share={share}", f"optim.peak_lr={rate}", f"log.every={every}"
    )
    again = reload(run)
    assert again == run
    assert again.stage.tokens.written == run.stage.tokens.written
    assert str(again.log.every) == every


def test_models_load_back() -> None:
    model = load_model("ibrahim2024-410m")
    assert load_model(parse_document(dump(model), "dump").data) == model


def test_written_forms_stay() -> None:
    text = dump(make_run("stage.replay.share=25%", "log.every=2M tokens", "optim.eps=1e-8"))
    for line in ("tokens: 20M", "share: 25%", "every: 2M tokens", "eps: 1.0e-8", "constant_lr: 55%"):
        assert line in text


STAGE: dict[str, Any] = {"stage": {"name": "python", "tokens": "5M", "mixture": {"python": "data/python"}}}


def test_a_stage_starts_afresh_and_the_rest_stays() -> None:
    parent = make_run("stage.replay={share: 5%, policy: fresh}", "optim.clip=2", "seed=7")
    made = overlay(parent, STAGE, run="runs/python")
    assert made.stage == make_run("stage={name: python, tokens: 5M, mixture: {python: data/python}}").stage
    assert made.run == Path("runs/python")
    unchanged = set(RunConfig.model_fields) - {"run", "stage"}
    assert {name: getattr(made, name) for name in unchanged} == {name: getattr(parent, name) for name in unchanged}


def test_sections_of_a_stage_file_merge() -> None:
    parent = make_run("evaluate.streams={english: e, old: o}", "schedule.min_lr=5%", "optim.beta2=0.99")
    child = {
        "stage": {**STAGE["stage"], "kind": "anneal"},
        "schedule": {"kind": "anneal"},
        "optim": {"peak_lr": 1e-4},
        "evaluate": {"streams": {"python": "p", "old": None}},
        "log": None,
    }
    made = overlay(parent, child, ["seed=3"], run="runs/python")
    assert made.schedule == AnnealSchedule.model_validate({"kind": "anneal", "min_lr": "5%"})
    assert (made.optim.peak_lr, made.optim.beta2) == (1e-4, 0.99)
    assert {name: str(path) for name, path in made.evaluate.streams.items()} == {"english": "e", "python": "p"}
    assert made.log == parent.log
    assert made.seed == 3


def test_the_run_folder_of_a_stage(tmp_path: Path) -> None:
    parent = make_run()
    assert overlay(parent, {**STAGE, "run": "runs/a"}).run == Path("runs/a")
    assert overlay(parent, {**STAGE, "run": "runs/a"}, run=tmp_path).run == tmp_path
    assert overlay(parent, STAGE, ["run=runs/b"]).run == Path("runs/b")
    with pytest.raises(ConfigError, match=r"^the stage: run: missing"):
        overlay(parent, STAGE)
    for same in ("runs/english", "runs/../runs/english"):
        with pytest.raises(ConfigError, match="give the new stage a folder of its own"):
            overlay(parent, STAGE, run=same)


def test_a_stage_needs_a_stage(tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text("optim: {peek_lr: 3}\n")
    with pytest.raises(ConfigError) as caught:
        overlay(make_run(), path, run="runs/x")
    assert str(caught.value).splitlines() == [
        f"{path}: stage: missing: `megacpt config explain stage` tells what belongs there",
        f"{path}:1: optim.peek_lr: unknown key; did you mean 'optim.peak_lr'?",
    ]


def test_a_stage_cannot_change_what_the_weights_are() -> None:
    parent = make_run("model=tiny")
    with pytest.raises(ConfigError) as caught:
        overlay(parent, {**STAGE, "model": {"layers": 8, "activation": "geglu"}}, run="runs/x")
    assert str(caught.value).splitlines() == [
        "the stage: model.layers: 8: a stage cannot change this, the weights were trained with 4: it decides how many "
        "weights there are, and their shapes; remove the key",
        "the stage: model.activation: geglu: a stage cannot change this, the weights were trained with swiglu: it "
        "decides what the trained weights compute; remove the key",
    ]
    longer = {"max_seq_length": 8192, "rope": {"base": 500000, "scaling": {"kind": "linear", "factor": 4}}}
    made = overlay(parent, {**STAGE, "model": longer}, run="runs/x")
    assert made.model.max_seq_length == 8192
    assert made.model.name == "tiny (changed)"
    assert overlay(parent, {**STAGE, "model": "tiny"}, run="runs/x").model == parent.model
