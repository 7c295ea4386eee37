"""Recipes as files: placeholders, formulas, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config import Duration, load_model
from megacpt.config.library import configs_folder, model_path, schedule_path
from megacpt.config.overrides import merge
from megacpt.errors import ConfigError
from megacpt.recipes.formula import Formula, Term
from megacpt.recipes.recipe import load_recipe, recipe_names
from megacpt.recipes.template import combinations, fill
from tests.cli.command import megacpt
from tests.recipes.cases import TINY

NAMES = ["curriculum-decay-averaging", "infinite-vs-cosine", "moe-under-shift", "rewarm-grid", "ternary-models"]


def test_the_recipes_of_the_papers_are_there() -> None:
    assert recipe_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_holds_together(name: str) -> None:
    recipe = load_recipe(name)
    assert all(comparison.formula.terms for comparison in recipe.comparisons)
    # Differences of losses: what all runs have in common cancels, so the factors of a sum add up to nothing.
    assert all(abs(sum(t.factor for t in c.formula.terms)) < 1e-12 for c in recipe.comparisons)
    used = {term.run for comparison in recipe.comparisons for term in comparison.formula.terms}
    sources = {run.source for run in recipe.runs}
    idle = [run.name for run in recipe.runs if run.name not in used | sources]
    assert len(idle) <= 3, f"trained for nothing: {idle}"
    models = [merge(recipe.base, run.keys).get("model") for run in recipe.runs if run.source is None]
    assert min(load_model(model).parameters(257) for model in models) < 200_000
    assert recipe.full_size


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_explained_where_it_first_stands(name: str) -> None:
    seen: set[str] = set()
    lines = (configs_folder() / "recipes" / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    for line in lines:
        assert len(line) <= 120
        key = re.match(r" *(?:- )?([\w-]+):(?: |$)", line)
        if key and key[1] not in seen:
            seen.add(key[1])
            assert re.search(r" # \S", line) or "- name:" in line, line


def test_full_size_settings_name_what_is_there() -> None:
    full = load_recipe("infinite-vs-cosine").full_size
    assert model_path(full["model"]).is_file()
    assert all(schedule_path(name).is_file() for name in full["schedules"].values())


def test_the_study_of_experts_names_what_is_there_at_full_size() -> None:
    full = load_recipe("moe-under-shift").full_size
    assert (configs_folder().parent / full["stages"] / "pretrain.yaml").is_file()
    assert all(model_path(name).is_file() for name in full["models"])
    assert all(schedule_path(name).is_file() for name in full["schedules"].values())


def test_the_whole_grid_of_the_study_of_experts_adds_to_the_default() -> None:
    text = (configs_folder() / "recipes" / "moe-under-shift.yaml").read_text()
    changes = re.findall(r'"(\w+=\[.*?\])"', text)
    assert len(changes) == 5
    default, whole = load_recipe("moe-under-shift"), load_recipe("moe-under-shift", changes)
    runs = {run.name: run for run in whole.runs}
    assert all(runs[run.name] == run for run in default.runs)
    assert (default.base, default.texts) == (whole.base, whole.texts)
    models = ("dense", "switch-penalty", "switch-sinkhorn", "granular-penalty", "granular-sinkhorn")
    shifted = {f"{m}-{s}-replay{r}" for m in models for s in ("python", "rot13") for r in (0, 10, 40)}
    assert shifted | {f"{m}-union" for m in models} < set(runs)
    assert len(runs) == len(shifted) + 5 * (1 + 1 + 3 + 1 + 3 + 1)  # first, releases, cosines, union


def test_measures_of_routing_need_a_model_with_experts(tmp_path: Path) -> None:
    text = TINY.read_text()
    busiest = "  busiest: {of: training_max_load, when: highest, after: 50%}\n"
    claim = "  - {name: load, value: release.busiest - still.busiest, expected: above 0}\n"
    added = text.replace("measures:\n", f"measures:\n{busiest}").replace("comparisons:\n", f"comparisons:\n{claim}")
    (tmp_path / "dense.yaml").write_text(added)
    with pytest.raises(ConfigError, match=r"release has no experts for busiest\n.*still has no experts"):
        load_recipe(str(tmp_path / "dense.yaml"))
    moe = "max_seq_length: 32, moe: {experts: 2}}"
    (tmp_path / "experts.yaml").write_text(added.replace("max_seq_length: 32}", moe))
    assert load_recipe(str(tmp_path / "experts.yaml")).measures["busiest"].of_experts


def test_constants_reach_runs_and_formulas() -> None:
    recipe = load_recipe("infinite-vs-cosine", ["first=c", "third=english", "tokens=5M", "little=10"])
    names = [run.name for run in recipe.runs]
    assert names[:3] == ["cosine-c", "cosine-python-replay0", "cosine-python-replay10"]
    assert recipe.runs[0].keys["stage"] == {"name": "c", "tokens": "5M", "mixture": {"c": "c"}}
    assert recipe.measures["first"].streams == ["c"]
    assert recipe.runs[-1].at == Duration.parse("85%")


def test_another_constant_leaves_the_rest_alone() -> None:
    assert load_recipe("rewarm-grid").training == load_recipe("rewarm-grid", ["tokens=600k"]).training
    assert load_recipe("rewarm-grid").training != load_recipe("rewarm-grid", ["tokens=700k"]).training


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("tokns=5M", r"'tokns=5M' changes no constant of the recipe tiny; did you mean 'tokens'"),
        ("tokens", "'tokens' changes no constant"),
    ],
)
def test_unknown_constants_are_refused(change: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_recipe(str(TINY), [change])


def test_unknown_recipes_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rewarm-grid'"):
        load_recipe("rewarm-gird")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("from: moved\n    anneal", "from: gone\n    anneal", "runs.release: from: no run before it is called 'gone'"),
        ("name: release", "name: still", "there are two runs of this name"),
        ("    from: moved\n    average", "    average", "need a run in `from`"),
        ("anneal: 50%", "anneal: 50%\n    keys: {seed: 1}", "give it one of `keys`, `anneal`, `average` and `round`"),
        ("value: moved.english", "value: moved.german", "there is no moved.german"),
        ("streams: [english, python]", "streams: [c]", "measures.both: no stream is of the domain 'c'"),
        ("when: start", "when: start, within: 50%", "`within` belongs to `when: highest`"),
        ("when: start", "when: start, after: 50%", "`after` belongs to `when: highest`"),
        ("{streams: [english]}", "{of: training_max_load, streams: [english]}", "training_max_load has no `streams`"),
        ("{streams: [english]}", "{of: training_max_load, when: start}", "nothing is trained on at the start"),
        ("{streams: [english]}", "{of: max_load}", "measures.english: give it `streams`"),
        ("tokens: $tokens", "tokens: $tokes", r"\$tokes has no value; did you mean 'tokens'"),
        ("expected: above 0", "expected: positive", "comparisons.3.expected"),
        ("measures:", "mesures:", "measures: Field required"),
    ],
)
def test_a_recipe_that_does_not_hold_together_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    text = TINY.read_text()
    assert old in text
    (tmp_path / "other.yaml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        load_recipe(str(tmp_path / "other.yaml"))


def test_placeholders_become_what_yaml_reads() -> None:
    values = {"n": 3, "rate": 4e-3, "list": [1, 2], "word": "x"}
    content = {"a-$word": "$n", "b": ["$rate", "$n%", "$list"], "c": {"d": "p-$word.q", "e": 5}}
    assert fill(content, values) == {"a-x": 3, "b": [4e-3, "3%", [1, 2]], "c": {"d": "p-x.q", "e": 5}}
    with pytest.raises(ConfigError, match="write \\$\\$ for a dollar sign"):
        fill("100$", values)


def test_combinations() -> None:
    assert combinations(None) == [{}]
    assert combinations({"a": [1, 2], "b": [3, 4]}) == [
        {"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4},
    ]  # fmt: skip
    assert combinations([{"a": 1, "b": 2}]) == [{"a": 1, "b": 2}]


names = st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True)
terms = st.lists(
    st.tuples(
        st.sampled_from("+-"), st.integers(1, 99).map(lambda n: n / 4), names, st.from_regex(r"[a-z-]+", fullmatch=True)
    ),
    min_size=1,
    max_size=5,
)


@given(terms)
def test_formulas_are_read_as_they_are_written(parts: list[tuple[str, float, str, str]]) -> None:
    text = " ".join(f"{sign} {factor} * {run}.{measure}" for sign, factor, run, measure in parts)
    if parts[0][0] == "-":
        text = f"0 * x.y {text}"
    formula = Formula.parse(text.removeprefix("+ "))
    wanted = [Term(-factor if sign == "-" else factor, run, measure) for sign, factor, run, measure in parts]
    assert list(formula.terms)[-len(wanted) :] == wanted
    value = formula.value(lambda run, measure: float(len(run) + 10 * len(measure)))
    assert value == pytest.approx(sum(t.factor * (len(t.run) + 10 * len(t.measure)) for t in wanted))


@pytest.mark.parametrize("text", ["", "a", "a.b -", "a.b c.d", "2 a.b"])
def test_what_is_no_formula_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no term"):
        Formula.parse(text)


def test_the_list(tmp_path: Path) -> None:
    done = megacpt("recipe", "list", folder=tmp_path)
    assert done.status == 0
    assert all(name in done.out for name in NAMES)
