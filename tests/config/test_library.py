"""The files in configs/: they load, they are explained, and the models have their published sizes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

import megacpt
from megacpt.config import check_layout, load_model, load_run, overlay
from megacpt.config.library import configs_folder, model_path, names
from megacpt.config.yaml_text import read_document
from megacpt.errors import ConfigError, SetupError

# Recipes repeat their keys run after run: tests/recipes looks that each is explained where it first stands.
FILES = sorted(
    path
    for path in [*configs_folder().glob("*/*.yaml"), *configs_folder().glob("recipes/*/*.yaml")]
    if path.parent.name != "recipes"
)

# Published parameter counts. Those of the Spectra suite follow from its table of sizes in bits, 16 for each weight.
PUBLISHED = {
    "llama3-8b": 8.03e9,
    "llama3-70b": 70.55e9,
    "ibrahim2024-410m": 405e6,
    "ibrahim2024-10b": 9.6e9,
    "therien2025-dense-570m": 570e6,
    "therien2025-switch-penalty-2b": 2.02e9,
    "therien2025-switch-sinkhorn-2b": 2.02e9,
    "therien2025-granular-penalty-2b": 2.02e9,
    "therien2025-granular-sinkhorn-2b": 2.02e9,
    "spectra-floatlm-99m": 1.60e9 / 16,
    "spectra-floatlm-190m": 3.05e9 / 16,
    "spectra-floatlm-390m": 6.28e9 / 16,
    "spectra-floatlm-560m": 9.11e9 / 16,
    "spectra-floatlm-830m": 13.34e9 / 16,
    "spectra-floatlm-1.1b": 18.39e9 / 16,
    "spectra-floatlm-1.5b": 24.23e9 / 16,
    "spectra-floatlm-2.4b": 39.38e9 / 16,
    "spectra-floatlm-3.9b": 63.83e9 / 16,
}
PUBLISHED |= {name.replace("floatlm", "trilm"): size for name, size in PUBLISHED.items() if "floatlm" in name}

OURS = {
    "tiny": 836_736,
    "small": 23_994_880,
    "mini-dense": 141_632,
    "mini-switch-penalty": 615_744,
    "mini-switch-sinkhorn": 615_744,
    "mini-granular-penalty": 618_688,
    "mini-granular-sinkhorn": 618_688,
}
EXPERTS = [name for name in names("models") if re.search("switch|granular", name)]


@pytest.mark.parametrize("name", names("models"))
def test_models(name: str) -> None:
    model = load_model(name)
    assert model.name == name
    parameters = model.parameters(257)
    if name in PUBLISHED:
        assert model.vocab_size is not None
        assert parameters == pytest.approx(PUBLISHED[name], rel=0.005)
    else:
        assert parameters == OURS[name]


def test_all_published_models_are_there() -> None:
    assert set(names("models")) == {*OURS, *PUBLISHED}


@pytest.mark.parametrize("name", EXPERTS)
def test_models_with_experts_cost_as_much_as_their_dense_twin(name: str) -> None:
    model = load_model(name)
    twin = load_model("mini-dense" if name.startswith("mini") else "therien2025-dense-570m")
    moe = model.moe
    assert moe is not None
    assert moe.top_k * model.expert_ffn + moe.shared_ffn == twin.ffn
    same = {key: value for key, value in model.model_dump().items() if key not in ("name", "moe")}
    assert same == {key: value for key, value in twin.model_dump().items() if key not in ("name", "moe")}
    routers = model.layers * model.hidden * moe.experts
    assert model.parameters(257, active=True) - routers == twin.parameters(257)
    if not name.startswith("mini"):
        assert model.parameters(active=True) == pytest.approx(570e6, rel=0.005)
    assert moe.balance.kind in name


def test_laptop_models_with_experts_are_the_full_ones_made_small() -> None:
    for name in EXPERTS:
        small, full = load_model(f"mini-{'-'.join(name.split('-')[1:3])}").moe, load_model(name).moe
        assert small is not None
        assert full is not None
        widths = {"ffn", "shared_ffn"}
        assert small.model_dump(exclude=widths) == full.model_dump(exclude=widths)


def test_the_full_size_study_has_the_steps_of_its_paper() -> None:
    folder = configs_folder() / "recipes" / "therien2025"
    first = load_run(folder / "pretrain.yaml")
    check_layout(first, 64, 128_000)
    assert (first.stage_steps, first.tokens_per_step, first.optim.peak_lr) == (192_720, 2**21, 3e-4)
    for name, share in (("code", 0.3), ("german", 0.4)):
        stage = overlay(first, folder / f"{name}.yaml", run=f"runs/{name}")
        assert (stage.stage_steps, stage.stage.replay.share, stage.schedule.kind) == (95_370, share, "infinite")
    union = load_run(folder / "union.yaml")
    assert union.stage_steps == 192_720 + 95_370
    assert (union.batch, union.model, union.optim) == (first.batch, first.model, first.optim)
    for name in EXPERTS:
        if name.startswith("therien2025"):
            check_layout(load_run(folder / "pretrain.yaml", [f"model={name}"]), 64, 128_000)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_key_is_explained_where_it_stands(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    for line in lines:
        if re.match(r" *\w+:", line):
            assert re.search(r" # \S", line), line
        assert len(line) <= 120


@pytest.mark.parametrize("size", ["99m", "190m", "390m", "560m", "830m", "1.1b", "1.5b", "2.4b", "3.9b"])
def test_trilms_are_the_floatlms_with_ternary_matrices(size: str) -> None:
    tri, floats = load_model(f"spectra-trilm-{size}"), load_model(f"spectra-floatlm-{size}")
    assert tri.model_dump(exclude={"name", "quantise"}) == floats.model_dump(exclude={"name", "quantise"})
    assert tri.quantise is not None
    assert (tri.quantise.grid, tri.quantise.scale.rule, tri.quantise.activations) == ("ternary", "add", "none")
    # One scale for each of the paper's model-parallel shards (table of sizes).
    shards = {"1.1b": 2, "1.5b": 2, "2.4b": 3, "3.9b": 6}.get(size, 1)
    assert (tri.quantise.scale.scope, tri.quantise.scale.shards) == ("shard", shards)
    # The paper counts 16 bits of embeddings and head, and log2(3) bits of the other matrices.
    outside = 2 * tri.padded_vocab() * tri.hidden
    bits = {"99m": 0.90, "190m": 1.42, "390m": 2.11, "560m": 2.76, "830m": 3.55, "1.1b": 4.42, "1.5b": 5.36}
    bits |= {"2.4b": 7.23, "3.9b": 10.76}
    found = 16 * outside + math.log2(3) * (tri.parameters() - outside)
    assert found / 1e9 == pytest.approx(bits[size], rel=0.01)
    run = load_run(
        configs_folder() / "runs" / "english.yaml", [f"model=spectra-trilm-{size}", f"parallel.tensor={shards}"]
    )
    check_layout(run, shards)
    assert f"spectra-{size}" in names("schedules")


@pytest.mark.parametrize("path", sorted((configs_folder() / "models").glob("*.yaml")), ids=lambda path: path.stem)
def test_models_write_every_key(path: Path) -> None:
    # head_dim follows from the others in all of them, and the name is that of the file.
    # A dense model need not say so.
    model, written = load_model(path.stem), read_document(path).data
    # Nor need a float model say that nothing is quantised, or one of grouped queries that they are not latent.
    optional = {"moe", "quantise", "latent"}
    assert set(written) - optional == set(type(model).model_fields) - {"name", "head_dim", *optional}
    if model.moe is not None:
        assert set(written["moe"]) == set(type(model.moe).model_fields)
        assert set(written["moe"]["balance"]) == set(type(model.moe.balance).model_fields)


def test_the_example_run_names_every_key() -> None:
    path = configs_folder() / "runs" / "english.yaml"
    run = load_run(path)
    written = read_document(path).data
    for section, values in run.model_dump().items():
        if isinstance(values, dict) and section != "model":
            assert set(written[section]) == set(values), section
    assert set(written) == set(type(run).model_fields)


def test_the_example_run_and_its_stages() -> None:
    run = load_run(configs_folder() / "runs" / "english.yaml")
    check_layout(run, 2, 257)
    stages = configs_folder() / "stages"
    python = overlay(run, stages / "python.yaml", run="runs/python")
    assert python.stage.replay.share == 0.25
    assert set(python.evaluate.streams) == {"english", "python"}
    release = overlay(python, stages / "anneal.yaml", run="runs/release")
    assert release.schedule.kind == "anneal"
    german = overlay(release, stages / "rewarm.yaml", run="runs/german")
    assert german.schedule.kind == "rewarmed_cosine"
    longer = overlay(python, stages / "long-context.yaml", run="runs/python-long")
    assert (longer.model.rope.base, longer.batch.seq_length, longer.tokens_per_step) == (1e5, 4096, run.tokens_per_step)
    check_layout(longer, 2, 257)
    phased = overlay(python, stages / "phased.yaml", run="runs/phased")
    assert [(str(phase.after), phase.weights) for phase in phased.stage.phases] == [
        ("20%", {"web": 1, "books": 3}),
        ("90%", {"web": 0}),
    ]
    kept = overlay(python, stages / "reservoir.yaml", run="runs/german")
    assert kept.stage.replay.size == 2_000_000
    assert kept.stage.controller is not None
    assert kept.stage.controller.max == 0.4
    proxy = overlay(run, stages / "proxy.yaml", run="runs/medical")
    assert {name: stream.weight for name, stream in proxy.stage.replay.streams.items()} == {"web": 4, "code": 1}
    assert proxy.stage.mixture["medical"].epochs == 4
    assert names("stages") == ["anneal", "long-context", "phased", "proxy", "python", "reservoir", "rewarm"]


def test_tiny_fits_the_layouts_of_a_laptop() -> None:
    run = configs_folder() / "runs" / "english.yaml"
    for layout in ("tensor=2", "tensor=4", "pipeline=4", "context=2"):
        check_layout(load_run(run, [f"parallel.{layout}"]), 4, 257)
    check_layout(load_run(run, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]), 2, 257)


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"there is no model 'lama3-8b'; did you mean 'llama3-8b'\? \(known: "):
        model_path("lama3-8b")
    assert model_path("models/mine.yaml") == Path("models/mine.yaml")
    assert model_path("mine.yml") == Path("mine.yml")


def test_a_foreign_folder_of_that_name_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "megacpt").mkdir()
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(megacpt, "__file__", str(tmp_path / "megacpt" / "__init__.py"))
    with pytest.raises(SetupError, match="install megacpt again"):
        configs_folder.__wrapped__()
    inside = tmp_path / "megacpt" / "configs" / "models"
    inside.mkdir(parents=True)
    (inside / "tiny.yaml").touch()
    assert configs_folder.__wrapped__() == inside.parent
