"""What a recipe is: runs that descend from each other, what is measured of them, and which signs a paper claims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from megacpt.config import Share, load_model
from megacpt.config.base import Interval, Section
from megacpt.config.library import configs_folder, looks_like_path
from megacpt.config.overrides import merge
from megacpt.config.yaml_text import parse_value, read_document
from megacpt.errors import ConfigError, nearest
from megacpt.recipes.formula import Formula
from megacpt.recipes.template import combinations, fill

Domain = Literal["english", "python", "c", "rot13"]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_TEMPLATED = ("texts", "base", "runs", "measures", "comparisons", "full_size")


class Text(Section):
    """A stream of text that every machine has."""

    domain: Domain = Field(
        description="Which text: English prose, Python or C, as `megacpt demo` collects them; or rot13, the English "
        "with each letter moved by 13 places: known letters, unknown words, for a strong shift."
    )
    noise: Share = Field(
        default=Share.parse("0%"),
        description="Replace characters of each document at random: a share of them that is drawn, document by "
        "document, from 0 to this. The stream gets a score column, 1 - share. Held-out text stays clean.",
    )


class Texts(Section):
    """The streams of a recipe; a held-out one of each domain is measured in every run."""

    bytes: Annotated[int, Field(ge=1)] = Field(default=4_000_000, description="Most bytes of text of a domain.")
    streams: dict[str, Annotated[Text, BeforeValidator(lambda v: {"domain": v} if isinstance(v, str) else v)]] = Field(
        min_length=1, description="Streams by name; `NAME: DOMAIN` is short for `NAME: {domain: DOMAIN}`."
    )


class Average(Section):
    """A checkpoint that is the mean of a run's last ones."""

    last: Annotated[int, Field(ge=1)] = Field(description="How many checkpoints of the run.")
    ema: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Share with which each later checkpoint enters a moving average; null: equal weights."
    )


class Rounding(Section):
    """A checkpoint whose matrices are those of a run, rounded to the nearest level."""

    bits: Annotated[int, Field(ge=2, le=8)] = Field(description="Bits a weight.")
    group: Annotated[int, Field(ge=8)] = Field(default=128, description="Weights of a row that share a scale.")


class RecipeRun(Section):
    """A run: trained from nothing, on from another run, annealed from it, averaged of its checkpoints, or rounded."""

    name: RunName = Field(description="Name of the run and its folder.")
    source: RunName | None = Field(default=None, alias="from", description="The run that it continues.")
    at: Interval | None = Field(
        default=None, description="Where in that run's stage, which must have a checkpoint there; null: at its end."
    )
    keys: dict[str, Any] = Field(
        default_factory=dict, description="Keys of a run; of a stage file where it continues another run."
    )
    anneal: Interval | None = Field(
        default=None, description="Anneal a branch of this length: a percentage of the stage, steps, or tokens."
    )
    average: Average | None = Field(default=None, description="Average checkpoints of the run in `from`.")
    rounding: Rounding | None = Field(
        default=None, alias="round", description="Round the matrices of the run in `from`."
    )

    @property
    def trained(self) -> bool:
        """Whether it has steps of its own."""
        return self.average is None and self.rounding is None


class Measure(Section):
    """A number taken from a run: loss or routing of held-out text, averaged over streams, or routing in training."""

    of: Literal["bits_per_byte", "max_load", "saturation_start", "training_max_load"] = Field(
        default="bits_per_byte",
        description="Bits a byte; or of a model with experts, as the mean over its layers: the busiest expert's share "
        "of the tokens, the share of the choices that are still those before the first step, or the busiest expert's "
        "share of the batches that are trained on.",
    )
    streams: list[str] = Field(
        default_factory=list, description="Domains whose held-out text counts, each alike. None with training_max_load."
    )
    when: Literal["start", "end", "highest"] = Field(
        default="end", description="Before the first step, after the last, or the highest value after the first step."
    )
    within: Interval | None = Field(default=None, description="highest: only up to here in the stage.")
    after: Interval | None = Field(default=None, description="highest: only behind this point of the stage.")

    @property
    def of_experts(self) -> bool:
        """Whether only a model with experts has it."""
        return self.of != "bits_per_byte"

    @property
    def of_training(self) -> bool:
        """Whether it is taken from the batches that are trained on."""
        return self.of == "training_max_load"


class Comparison(Section):
    """A sum of measures whose sign a paper claims."""

    name: str = Field(min_length=1, description="What is compared, in words.")
    value: str = Field(description="The sum: `RUN.MEASURE - RUN.MEASURE`, with factors as in `0.5 * RUN.MEASURE`.")
    expected: str = Field(
        pattern=r"^(below 0|above 0|within [0-9.]+)$",
        description="What the paper claims of it: `below 0`, `above 0`, or `within NUMBER` of 0 on both sides.",
    )

    @property
    def formula(self) -> Formula:
        """The sum."""
        return Formula.parse(self.value)


class Recipe(Section):
    """A comparison, with every placeholder filled in.

    Attributes:
        name: of its file.
        constants: values of placeholders, as they were used.
    """

    name: str
    title: str = Field(description="What is compared, in a line.")
    paper: str = Field(description="Where the claim was made.")
    claim: str = Field(description="The claim, in our words.")
    note: str = Field(default="", description="What is different at this size.")
    constants: dict[str, Any] = Field(
        default_factory=dict, description="Values for placeholders; `megacpt recipe run NAME KEY=VALUE` changes them."
    )
    texts: Texts = Field(description="What the runs read.")
    base: dict[str, Any] = Field(description="Keys of every run that starts from nothing.")
    runs: list[RecipeRun] = Field(min_length=1, description="The runs, each after the one that it continues.")
    measures: dict[str, Measure] = Field(min_length=1, description="What is measured of each run.")
    comparisons: list[Comparison] = Field(min_length=1, description="The claims.")
    full_size: dict[str, Any] = Field(default_factory=dict, description="The paper's settings, to be used at scale.")

    @property
    def training(self) -> dict[str, Any]:
        """What decides the numbers of the runs; the rest is how they are looked at."""
        return self.model_dump(mode="json", include={"name", "texts", "base", "runs"}, by_alias=True)


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with megacpt."""
    return sorted(path.stem for path in (configs_folder() / "recipes").glob("*.yaml"))


def load_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or by the path of its file, and fill in its placeholders.

    Args:
        name: a name from configs/recipes, or a path.
        changes: ``KEY=VALUE`` for its constants.

    Raises:
        ConfigError: unknown name or constant, or a recipe that does not hold together.
    """
    path = Path(name)
    if not looks_like_path(name):
        if name not in recipe_names():
            known = recipe_names()
            raise ConfigError(f"there is no recipe '{name}'{nearest(name, known)} (known: {', '.join(known)})")
        path = configs_folder() / "recipes" / f"{name}.yaml"
    data = read_document(path.expanduser()).data
    constants = {**data.get("constants", {}), **_changes(changes, data.get("constants", {}), path.stem)}
    try:
        made = Recipe.model_validate({"name": path.stem, **_filled(data, constants), "constants": constants})
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from error
    _check(made, path)
    return made


def _changes(texts: Sequence[str], known: Mapping[str, Any], recipe: str) -> dict[str, Any]:
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            raise ConfigError(
                f"'{text}' changes no constant of the recipe {recipe}{nearest(key, known)} "
                f"(it has {', '.join(f'{name}={value}' for name, value in known.items())})"
            )
        found[key] = parse_value(value)
    return found


def _filled(data: Mapping[str, Any], constants: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the constants, and write out runs and comparisons for each combination of their ``for``."""
    found = dict(data)
    for key in _TEMPLATED:
        if key in found:
            several = key in ("runs", "comparisons") and isinstance(found[key], list)
            found[key] = _each(found[key], constants) if several else fill(found[key], constants)
    return found


def _each(entries: Sequence[Any], constants: Mapping[str, Any]) -> list[Any]:
    found = []
    for entry in entries:
        content = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
        grid = content.pop("for", None)
        found += [fill(content, {**constants, **values}) for values in combinations(fill(grid, constants))]
    return found


def _check(recipe: Recipe, path: Path) -> None:
    """Refuse a recipe whose parts do not agree; all mistakes at once."""
    wrong: list[str] = []
    before: set[str] = set()
    for run in recipe.runs:
        if run.name in before:
            wrong.append(f"runs.{run.name}: there are two runs of this name")
        kinds = {"keys": bool(run.keys), "anneal": run.anneal, "average": run.average, "round": run.rounding}
        if run.source is None and (run.at or any(kinds[kind] for kind in ("anneal", "average", "round"))):
            wrong.append(f"runs.{run.name}: `at`, `anneal`, `average` and `round` need a run in `from`")
        if run.source is not None and run.source not in before:
            wrong.append(f"runs.{run.name}: from: no run before it is called '{run.source}'")
        if sum(map(bool, kinds.values())) != 1:
            wrong.append(f"runs.{run.name}: give it one of `keys`, `anneal`, `average` and `round`")
        before.add(run.name)
    domains = {text.domain for text in recipe.texts.streams.values()}
    for name, measure in recipe.measures.items():
        wrong += [f"measures.{name}: {text}" for text in _measure_problems(measure, domains)]
    experts = _with_experts(recipe)
    for comparison in recipe.comparisons:
        for term in comparison.formula.terms:
            if term.run not in before or term.measure not in recipe.measures:
                wrong.append(f"comparisons: {comparison.value}: there is no {term.run}.{term.measure}")
            elif recipe.measures[term.measure].of_experts and not experts.get(term.run):
                wrong.append(f"comparisons: {comparison.value}: {term.run} has no experts for {term.measure}")
    if wrong:
        raise ConfigError("\n".join(f"{path}: {text}" for text in wrong))


def _measure_problems(measure: Measure, domains: set[Domain]) -> Iterator[str]:
    yield from (f"no stream is of the domain '{s}'" for s in measure.streams if s not in domains)
    if measure.of_training == bool(measure.streams):
        yield "training_max_load has no `streams`" if measure.of_training else "give it `streams`"
    if measure.of_training and measure.when == "start":
        yield "nothing is trained on at the start: `when: end` or `highest`"
    for key in ("within", "after"):
        if getattr(measure, key) is not None and measure.when != "highest":
            yield f"`{key}` belongs to `when: highest`"


def _with_experts(recipe: Recipe) -> dict[str, bool]:
    """Whether the model of each trained run has experts."""
    found: dict[str, bool] = {}
    for run in recipe.runs:
        if run.source is None and isinstance(model := merge(recipe.base, run.keys).get("model"), str | dict):
            found[run.name] = load_model(model).moe is not None
        elif run.source in found and run.trained:
            found[run.name] = found[run.source]
    return found
