"""What a recipe found: the signs beside those that were claimed, as a table, JSON and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megacpt import __version__
from megacpt.bench.machine import this_machine
from megacpt.checkpoint.store import find_checkpoint
from megacpt.config.yaml_text import write_yaml
from megacpt.continuation.ledger import Ledger
from megacpt.data.files import write_bytes, write_json
from megacpt.recipes.execute import Executed
from megacpt.recipes.measure import RunRecord
from megacpt.recipes.recipe import Comparison, Recipe
from megacpt.recipes.statistics import Estimate, estimate


@dataclass(frozen=True)
class Finding:
    """A comparison and what came of it.

    Attributes:
        name: what is compared.
        value: the sum of measures.
        expected: the claim about it.
        values: one for each seed.
        estimate: their mean and its interval.
        verdict: whether the claim holds here, in words.
    """

    name: str
    value: str
    expected: str
    values: list[float]
    estimate: Estimate
    verdict: str


@dataclass(frozen=True)
class RecipeResult:
    """All that a recipe found.

    Attributes:
        recipe: what was run.
        seeds: seeds of the repetitions.
        findings: the comparisons.
        measures: by run and measure, a value for each seed; a measure that a run lacks is left out.
        seconds: wall time by run, over all seeds.
        tokens: tokens of the stage of each run; 0 for an average.
        created: date and time, UTC.
    """

    recipe: Recipe
    seeds: list[int]
    findings: list[Finding]
    measures: dict[str, dict[str, list[float]]]
    seconds: dict[str, float]
    tokens: dict[str, int]
    created: str


def verdict(expected: str, found: Estimate) -> str:
    """Say whether a claim holds: certain where the interval leaves no other answer."""
    side, _, number = expected.partition(" ")
    if side == "within":
        margin = float(number)
        holds, never = abs(found.mean) < margin, "larger than claimed"
        certain = _inside(found, -margin, margin) if holds else _outside(found, margin)
    else:
        factor = -1.0 if side == "below" else 1.0
        holds, never = factor * found.mean > 0, "opposite sign"
        certain = found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)
    answer = "as claimed" if holds else never
    return answer if certain else f"{answer}, not certain"


def _inside(found: Estimate, low: float, high: float) -> bool:
    return found.low is not None and found.high is not None and low < found.low and found.high < high


def _outside(found: Estimate, margin: float) -> bool:
    return found.low is not None and found.high is not None and (found.low > margin or found.high < -margin)


def finding(comparison: Comparison, records: Sequence[Mapping[str, RunRecord]], recipe: Recipe) -> Finding:
    """Return what came of a comparison over the seeds, each with itself."""
    values = [
        comparison.formula.value(lambda run, measure, seed=seed: seed[run].measured(recipe.measures[measure]))  # type: ignore[misc]
        for seed in records
    ]
    found = estimate(values)
    claim = comparison.expected
    return Finding(comparison.name, comparison.value, claim, values, found, verdict(claim, found))


def collect(recipe: Recipe, executed: Executed) -> RecipeResult:
    """Measure the runs of a recipe and compare."""
    names = [run.name for run in recipe.runs]
    records = [{name: RunRecord.read(path) for name, path in folders.items()} for folders in executed.folders]
    tokens = {
        run.name: 0 if run.average else Ledger.read(find_checkpoint(executed.folders[0][run.name])).stage.tokens
        for run in recipe.runs
    }
    measures: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for name in names:
        for key, measure in recipe.measures.items():
            values = [seed[name].find(measure) for seed in records]
            if None not in values:
                measures[name][key] = [value for value in values if value is not None]
    return RecipeResult(
        recipe=recipe,
        seeds=executed.seeds,
        findings=[finding(comparison, records, recipe) for comparison in recipe.comparisons],
        measures=measures,
        seconds={name: sum(seconds.get(name, 0.0) for seconds in executed.seconds) for name in names},
        tokens=tokens,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def write_result(result: RecipeResult, out: Path) -> None:
    """Write result.json and result.md."""
    recipe = result.recipe
    content: dict[str, Any] = {
        "format": 1,
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "megacpt": __version__,
        "machine": this_machine().model_dump(mode="json"),
        **{key: value for key, value in vars(result).items() if key not in ("recipe", "findings")},
        "findings": [asdict(found) for found in result.findings],
    }
    write_json(out / "result.json", content)
    write_bytes(out / "result.md", markdown(result).encode())


def markdown(result: RecipeResult) -> str:
    """Return the result as a page."""
    recipe = result.recipe
    lines = [f"# {recipe.title}", "", f"Claim ({recipe.paper}): {recipe.claim.strip()}", ""]
    lines += [recipe.note.strip(), ""] if recipe.note else []
    settings = ", ".join(f"{key}={value}" for key, value in recipe.constants.items())
    lines += [
        f"`megacpt recipe run {recipe.name} --seeds {len(result.seeds)}` on {result.created[:10]}, with {settings}; "
        f"{sum(result.seconds.values()) / 60:.0f} minutes of wall time. Losses are bits a byte on held-out text; "
        "intervals of 95 % (Student's t), paired by seed. Intervals are not corrected for the number of comparisons.",
        "",
        "| comparison | claimed | found | 95 % interval | verdict |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in finding_rows(result)),
        "",
        "Means over the seeds, with the standard deviation:",
        "",
        f"| run | tokens | {' | '.join(recipe.measures)} |",
        f"|---|---|{'---|' * len(recipe.measures)}",
        *(f"| {' | '.join(row)} |" for row in measure_rows(result)),
    ]
    if recipe.full_size:
        lines += ["", "The paper's settings:", "", "```yaml", write_yaml(recipe.full_size).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def finding_rows(result: RecipeResult) -> list[tuple[str, ...]]:
    """Return the comparisons as rows: name, claim, mean, interval, verdict."""
    rows: list[tuple[str, ...]] = []
    for found in result.findings:
        low, high = found.estimate.low, found.estimate.high
        interval = "one seed" if low is None or high is None else f"{low:+.4f} to {high:+.4f}"
        rows.append((found.name, found.expected, f"{found.estimate.mean:+.4f}", interval, found.verdict))
    return rows


def measure_rows(result: RecipeResult) -> list[tuple[str, ...]]:
    """Return the runs as rows: name, tokens, and each measure."""
    rows: list[tuple[str, ...]] = []
    for name, measures in result.measures.items():
        cells = (_cell(measures.get(key)) for key in result.recipe.measures)
        rows.append((name, f"{result.tokens[name]:,}" if result.tokens[name] else "average", *cells))
    return rows


def _cell(values: Sequence[float] | None) -> str:
    if values is None:
        return ""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    spread = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.3f} ± {spread:.3f}"
