from __future__ import annotations

import re

import pytest

from megacpt.config import run_from_mapping
from megacpt.config.explain import explain
from megacpt.config.keys import ANY, ITEM, catalogue, children, find, nearest_key
from megacpt.config.overrides import parse_overrides
from megacpt.config.problems import example_text
from megacpt.errors import ConfigError
from tests.config.helpers import plain_run

ALL = sorted(catalogue())
# What else has to be given with some keys, or some of their values.
NEEDS = {
    "model.latent.": ["model.latent={kv_rank: 16, plain_dim: 8, rope_dim: 8, value_dim: 8}", "model.kv_heads=null"],
    "model.moe.": ["model.moe.experts=8"],
    "model.moe.renormalise": ["model.moe.top_k=2"],
    "model.moe.groups_kept": ["model.moe={experts: 8, groups: 8, top_k: 4}"],
    "model.moe.balance.rule=megatron": ["model.moe.balance={kind: sinkhorn, scope: rank, warm_start: false}"],
    "model.moe.balance.rule=neox3": ["model.moe.balance={kind: sinkhorn, scope: rank, warm_start: false}"],
    "model.quantise.": ["model.quantise.grid=ternary"],
    "model.quantise.bits": ["model.quantise.grid=int"],
    "model.quantise.grid=int": ["model.quantise.bits=4"],
    "model.quantise.grid=quest": ["model.quantise={bits: 4, scale: {scope: group, group: 16}}"],
    "model.quantise.scale.scope=shard": ["model.quantise.scale.shards=2"],
    "model.quantise.scale.scope=group": ["model.quantise.scale.group=16"],
    "model.quantise.scale.shards": ["model.quantise.scale.scope=shard"],
    "model.quantise.scale.group": ["model.quantise.scale.scope=group", "model.ffn=384"],
    "parallel.gather=2bit": ["parallel.distributed_optimizer=true", "model.quantise.grid=ternary"],
    "stage.controller.": ["stage.controller={}", "evaluate.streams={old: data/old}"],
    f"stage.phases.{ITEM}": ["stage.phases=[{after: 50%, replay: 5%}]"],
    f"stage.mixture.{ANY}.select": ["stage.mixture.english.epochs=2"],
    "stage.replay.size": ["stage.replay.policy=reservoir"],
    "stage.replay.streams": ["stage.replay={policy: external, streams: {english: data/old}}"],
    "stage.replay.policy=reservoir": ["stage.replay.size=1B"],
    "stage.replay.policy=external": ["stage.replay.streams={web: data/web}"],
}
# What scalings of rotary positions ask for.
SCALINGS = {"linear": ", factor: 2", "yarn": ", factor: 2, original_length: 64"}


@pytest.mark.parametrize("path", ALL)
def test_every_key_is_described(path: str) -> None:
    for key in catalogue()[path]:
        assert re.match(r"[A-Za-z].{14,}[.:)\w]$", key.description, re.S), key
        assert key.type
        assert key.section or key.examples or key.choices, "no example"


@pytest.mark.parametrize("path", ALL)
def test_every_key_can_be_explained(path: str) -> None:
    text = explain(path.replace(ANY, "python"), width=80)
    assert text.startswith(path.replace(ANY, "python") + ": ")
    assert all(len(line) <= 80 for line in text.splitlines() if "`" not in line)
    if not catalogue()[path][0].section:
        assert "In a file:" in text
        assert "Default:" in text or path.endswith("kind")


@pytest.mark.parametrize("path", [path for path in ALL if not catalogue()[path][0].section])
def test_every_example_is_accepted(path: str) -> None:
    for key in catalogue()[path]:
        for example in (*key.examples, *key.choices):
            section = []
            if key.kinds and key.name != "kind":
                parent = path.rpartition(".")[0]
                kind = key.kinds[0]
                section = [f"{parent}={{kind: {kind}{SCALINGS.get(kind, '') if 'rope' in parent else ''}}}"]
            if path == "model.moe.balance.scope":
                section = [f"{path.rpartition('.')[0]}.kind={key.kinds[0]}"]
            section += [change for start, changes in NEEDS.items() if path.startswith(start) for change in changes]
            section += NEEDS.get(f"{path}={example}", [])
            if "anneal" in (*key.kinds, example):
                section += ["stage.kind=anneal", "schedule.kind=anneal"]
            if path == "model.rope.scaling.kind":
                section.append(f"model.rope.scaling={{kind: {example}{SCALINGS.get(example, '')}}}")
            if path in ("model.kv_heads", "model.heads"):
                section += ["model.hidden=4096", "model.heads=32", "model.kv_heads=4"]
            override = f"{path.replace(ANY, 'english').replace(ITEM, '0')}={example_text(example)}"
            run_from_mapping(plain_run(), [*section, override])


def test_explaining_a_key() -> None:
    assert explain("optim.clip").splitlines() == [
        "optim.clip: number or null",
        "  Gradients are scaled down where their global L2 norm exceeds this. null: no clipping.",
        "  Allowed: above 0, null",
        "  Default: 1.0",
        "",
        "  In a file:            clip: 1.0",
        "  On the command line:  optim.clip=1.0",
        "",
        "  In configs/:",
        "    1.0: runs/english",
    ]


def test_explaining_a_section_lists_its_keys() -> None:
    text = explain("optim")
    listed = re.findall(r"^  (\w+) ", text.partition("\n\n")[2], re.M)
    assert listed == [keys[0].name for keys in children("optim")]
    assert re.search(r"peak_lr +required +Highest learning rate", text)
    assert "tiny" in explain("model")
    assert re.search(r"<name> +Any name of your choice", explain("stage.mixture"))


def test_explaining_variants() -> None:
    assert "With schedule.kind infinite:" in explain("schedule.warmup")
    assert "cumulative end point" in explain("schedule.cooldown").replace("\n  ", " ")
    assert "This is the default." in explain("schedule.kind")


def test_explaining_the_root() -> None:
    text = explain()
    assert all(re.search(rf"^  {keys[0].name} ", text, re.M) for keys in children(""))


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("optim.peek_lr", "optim.peak_lr"),
        ("peak_lr", "optim.peak_lr"),
        ("optm", "optim"),
        ("schedule.cool", "schedule.cooldown"),
        ("stage.mixture.x.path.y", None),
    ],
)
def test_explaining_what_is_unknown(key: str, near: str | None) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{key}'") as caught:
        explain(key)
    if near:
        assert f"did you mean '{near}'?" in str(caught.value)


@pytest.mark.parametrize("path", ALL)
def test_a_letter_too_many_is_recognised(path: str) -> None:
    if path.endswith(ANY):
        return
    wrong = path.replace(ANY, "python") + "s"
    if find(wrong.split(".")):
        return
    assert nearest_key(wrong.split(".")) == path.replace(ANY, "python")
    with pytest.raises(ConfigError, match="did you mean"):
        parse_overrides([f"{wrong}=1"])


def test_names_stand_for_themselves() -> None:
    assert find(("stage", "mixture", "no", "weight"))[0].path == f"stage.mixture.{ANY}.weight"
    assert find(("evaluate", "streams", "x"))[0].type == "path"
    assert find(("stage", "mixture", "")) == ()
    assert find(()) == ()
