"""What a report says of experts: each boundary, figures, JSON; and nothing for dense models."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from megacpt.report.content import gather
from megacpt.report.lineage import chain
from megacpt.report.record import load_run
from megacpt.report.routing import timeline
from tests.report.lab import STEP, Lab, save, write_metrics
from tests.report.test_document import document
from tests.report.test_page import Page, report

MODEL = {"layers": 6, "hidden": 64, "ffn": 128, "heads": 2, "max_seq_length": 64}
LAYERS = [1, 2, 3, 4, 5, 6]
Runs = dict[str, Path]


def _moe(experts: int = 8, top_k: int = 2) -> dict[str, Any]:
    return {**MODEL, "moe": {"experts": experts, "top_k": top_k, "renormalise": True}}


def add_routing(run: Path, streams: list[str], high: float = 0.3, home: str | None = None, experts: int = 8) -> None:
    """Add made-up routing to a run: an imbalance that rises to `high` above even and falls, choices that change."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = sorted({line["step"] for line in lines if line["kind"] == "eval"})
    before = lines[0]["lineage_tokens"] - lines[0]["tokens"]
    noise = random.Random(run.name)
    for step in measured:
        at = {"step": step, "tokens": step * STEP, "lineage_tokens": before + step * STEP}
        rise = high * step / 8 * math.exp(1 - step / 8)
        for number, stream in enumerate(streams):
            # The first layers, and those of later streams, are worst.
            load = [0.3 + rise / layer / (1 + number) for layer in LAYERS]
            same = [1 - 0.4 * (1 - math.exp(-step / 9)) / layer / (1 + number) for layer in LAYERS]
            line = {"kind": "routing", **at, "stream": stream, "layers": LAYERS, "max_load": load}
            line |= {"saturation_start": same, "entropy": [0.9] * 6, "dropped": [0.0] * 6}
            if stream == home:
                line["saturation_home"] = [value - 0.1 for value in same]
            if step in (0, measured[-1]):
                weights = [[noise.random() ** (1 + 2 * number) for _ in range(experts)] for _ in LAYERS]
                line["expert_load"] = [[weight / sum(row) for weight in row] for row in weights]
            lines.append(line)
        if len(streams) > 1:
            shared = {"information": [0.2] * 6, "information_share": [0.1 + step / 1000] * 6}
            lines.append({"kind": "information", **at, "streams": streams, "layers": LAYERS, **shared})
    for line in lines:
        if line["kind"] == "train":
            rise = high * line["step"] / 4 * math.exp(1 - line["step"] / 4)
            line |= {f"moe/layer-{layer}/max_load": 0.28 + rise / layer for layer in LAYERS}
    write_metrics(run, sorted(lines, key=lambda line: line["step"]))


def lineage(lab: Lab, steps: int = 64) -> Runs:
    """English, then Python, then C, with experts."""
    names, runs, parent = ["english", "python", "c"], {}, None
    curves: dict[str, tuple[float, float]] = {"english": (8.1, 2.3), "python": (5.2, 4.4), "c": (5.6, 4.8)}
    for number, name in enumerate(names):
        bumps = {"english": (0.2, 6.0)} if number else None
        runs[name] = lab.run(name, name, curves, parent, steps, bumps=bumps, model=_moe())
        curves = {stream: (last, last - 0.3) for stream, (_, last) in curves.items()}
        parent = runs[name]
        add_routing(parent, names[: number + 2], 0.3, "english" if number else None)
    return runs


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return lineage(Lab(tmp_path_factory.mktemp("experts")))


@pytest.fixture(scope="module")
def page(experts: Runs, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report([experts["c"]], tmp_path_factory.mktemp("page") / "report.html")


def test_measurements_are_read(experts: Runs) -> None:
    record = load_run(experts["python"])
    assert record.unreadable == 0
    assert list(record.routing.streams) == ["english", "python", "c"]
    first, *_, last = record.routing.streams["english"]
    assert (first.step, first.tokens, first.layers) == (0, 64 * STEP, tuple(LAYERS))
    assert (last.step, last.tokens) == (64, 128 * STEP)
    assert first.mean("max_load") == pytest.approx(0.3)
    assert first.mean("vocabulary") is None
    assert len(first.experts["expert_load"]) == 6
    assert sum(first.experts["expert_load"][0]) == pytest.approx(1)
    assert len(record.routing.together) == len(record.routing.streams["english"])
    assert [point.step for point in record.routing.training] == list(range(1, 65))


def test_a_step_made_again_counts_once_and_a_damaged_line_is_counted(lab: Lab) -> None:
    run = lab.run("first", "english", {"english": (8.0, 2.0)}, steps=5)
    at = {"step": 3, "lineage_tokens": 3 * STEP, "layers": [1, 2]}
    good = [{"kind": "routing", "stream": "c", **at, "max_load": [value] * 2} for value in (0.5, 0.7)]
    bad = [{**good[0], "max_load": [0.5]}, {**good[0], "layers": None}, {**good[0], "max_load": ["x", 1]}]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_metrics(run, [*bad, *good, *lines])
    record = load_run(run)
    assert record.unreadable == 3
    (point,) = record.routing.streams["c"]
    assert point.numbers == {"max_load": (0.7, 0.7)}


def test_a_run_is_cut_where_the_next_one_branched_off(lab: Lab) -> None:
    """The parent went on after the branch; what it measured later is not the line's."""
    first = lab.run("first", "english", {"english": (8.0, 2.0)}, steps=20, model=_moe())
    add_routing(first, ["english"])
    branch = save(first, load_run(first).ledger, 12)
    second = lab.run("second", "python", {"python": (5.0, 4.0)}, branch, steps=4, model=_moe())
    cut, _ = chain([first, second])
    assert max(point.step for point in cut.routing.streams["english"]) == 12
    assert max(point.step for point in cut.routing.training) == 12


def test_what_a_boundary_did(experts: Runs) -> None:
    found = {(shift.stage, shift.stream): shift for shift in gather([experts["c"]]).subject.routed}
    streams = ["english", "python", "c"]
    assert set(found) == {(stage, stream) for stage in (1, 2) for stream in (None, *streams)}
    shift = found[1, "english"]
    assert (shift.before.mean, shift.before.worst) == (pytest.approx(0.3), pytest.approx(0.3))
    # The rise is highest at step 8, of the first layer by all of 0.3.
    assert (shift.peak_step, shift.peak.layer) == (8, 1)
    assert shift.peak.worst == pytest.approx(0.6)
    assert shift.peak.mean == pytest.approx(0.3 + 0.3 * sum(1 / layer for layer in LAYERS) / 6)
    assert shift.end.mean < 0.31
    assert shift.kept is not None
    assert shift.kept_home is not None
    assert (shift.kept.worst, shift.kept.layer) == (pytest.approx(0.6, abs=1e-3), 1)
    assert shift.kept_home.mean == pytest.approx(shift.kept.mean - 0.1)
    assert found[1, "python"].kept_home is None
    training = found[2, None]
    assert (training.peak_step, training.kept) == (4, None)
    assert training.before.mean == pytest.approx(0.28, abs=1e-3)  # the last step before the boundary
    assert training.peak.worst == pytest.approx(0.58)


def test_the_worst_is_looked_for_near_the_boundary(lab: Lab) -> None:
    first = lab.run("first", "english", {"english": (8.0, 2.0)}, steps=4, model=_moe())
    second = lab.run("second", "python", {"python": (5.0, 4.0)}, first, steps=2000, model=_moe())
    add_routing(second, ["english"])
    lines = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "routing":
            line["max_load"] = [line["step"] / 2000] * 6
    write_metrics(second, lines)
    # Measured at 0, 200, 400, ...: the highest of the first 512 steps, not of the stage.
    shift = next(s for s in gather([second]).subject.routed if s.stream == "english")
    assert (shift.peak_step, shift.peak.mean, shift.end.mean) == (400, pytest.approx(0.2), 1.0)


def test_the_time_after_a_boundary_doubles(lab: Lab) -> None:
    run = lab.run("first", "english", {"english": (8.0, 2.0)}, steps=50, bumps={"english": (0, 1)}, model=_moe())
    add_routing(run, ["english"])
    assert [point.step for point in timeline(load_run(run), "english")] == [0, 1, 2, 4, 8, 16, 32, 50]
    assert timeline(load_run(run), "c") == []


def test_the_page_has_a_section(page: Page) -> None:
    assert "Routing" in page.text
    assert "Even routing would give every expert 0.250 of the tokens." in page.text
    assert "python english 0.300 layer 1 0.300 0.422 step 8: layer 1 0.600" in page.text
    assert "python batches of training" in page.text
    for name in ("routing", "layers", "experts"):
        for kind in ("broad", "narrow"):
            assert f'id="{name}-{kind}-figure_1"' in page.source
    assert "from even to 0.60" in page.text
    assert "from none to 0.40" in page.text
    assert page.text.count("layer 6") >= 2
    assert len(set(page.ids)) == len(page.ids)


def test_the_colours_follow_the_theme(page: Page) -> None:
    figures = re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL)
    assert not [colour for figure in figures for colour in re.findall(r": (#[0-9a-f]{6})\b", figure)]


def test_the_document_has_the_same(experts: Runs, tmp_path: Path) -> None:
    found = document([experts["c"]], tmp_path)["routing"]
    assert found["even"] == 0.25
    assert [(shift["stage"], shift["stream"]) for shift in found["shifts"][:2]] == [(1, None), (1, "english")]
    assert found["shifts"][1]["peak"] == {"mean": pytest.approx(0.4225), "worst": pytest.approx(0.6), "layer": 1}
    english = found["held_out"]["english"]
    assert english[0]["layers"] == LAYERS
    assert english[0]["max_load"] == [0.3] * 6
    assert len(english[0]["expert_load"]) == 6
    assert [point["tokens"] for point in english] == sorted(point["tokens"] for point in english)
    assert found["information"][-1]["information_share"] == [0.164] * 6
    assert found["training"][0] == [STEP, *(pytest.approx(0.28 + 0.075 * math.exp(0.75) / n) for n in LAYERS)]


def test_dense_models_have_none_of_it(family: Runs, tmp_path: Path) -> None:
    text = report([family["python"]], tmp_path / "report.html").text
    assert "Routing" not in text
    assert document([family["python"]], tmp_path)["routing"] is None
    assert gather([family["python"]]).subject.routed == ()


def test_a_first_stage_alone_has_figures_and_no_table(experts: Runs, tmp_path: Path) -> None:
    text = report([experts["english"]], tmp_path / "report.html").text
    assert "Routing" in text
    assert "Choices kept" not in text


def test_a_line_beside_has_a_table_of_its_own(experts: Runs, family: Runs, tmp_path: Path) -> None:
    compare = {"two stages": [experts["python"]], "dense twin": [family["python"]]}
    text = report([experts["c"]], tmp_path / "report.html", compare=compare, label="three").text
    after = text[text.index("Choices kept") :]
    assert "three" in after
    assert "two stages" in after
    assert "dense twin" not in after[: after.index("Experts and streams")]


@pytest.mark.parametrize("steps", [0, 1])
def test_few_measurements_are_enough(steps: int, lab: Lab, tmp_path: Path) -> None:
    run = lab.run("first", "english", {"english": (8.0, 2.0)}, steps=20, stopped_at=steps, model=_moe())
    add_routing(run, ["english"])
    assert "Routing" in report([run], tmp_path / "report.html").text


def test_numbers_that_are_none_do_no_harm(lab: Lab, tmp_path: Path) -> None:
    first = lab.run("first", "english", {"english": (8.0, 2.0)}, steps=4, model=_moe())
    second = lab.run("second", "python", {"python": (5.0, 4.0)}, first, steps=20, model=_moe())
    for run in (first, second):
        add_routing(run, ["english"])
    lines = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "routing":
            line |= {"max_load": [None] * 6, "saturation_start": [None, *[1.0] * 5]}
    write_metrics(second, lines)
    assert "Routing" in report([second], tmp_path / "report.html").text
    shift = next(s for s in document([second], tmp_path)["routing"]["shifts"] if s["stream"] == "english")
    assert shift["end"]["mean"] is None
    assert shift["kept"]["layer"] == 2


def test_many_layers_and_experts_make_no_large_page(lab: Lab, tmp_path: Path) -> None:
    run = lab.run("first", "english", {"english": (8.0, 2.0), "c": (5.0, 4.0)}, steps=2000, model=_moe(64, 6))
    noise = random.Random(0)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    layers = list(range(1, 25))
    for line in [line for line in lines if line["kind"] == "eval"]:
        loads = [[noise.random() for _ in range(64)] for _ in layers]
        at = {key: line[key] for key in ("step", "tokens", "lineage_tokens", "stream")}
        numbers = {name: [noise.random() for _ in layers] for name in ("max_load", "saturation_start")}
        lines.append({"kind": "routing", **at, "layers": layers, **numbers, "expert_load": loads})
    plain = report([run], tmp_path / "plain.html")
    write_metrics(run, lines)
    page = report([run], tmp_path / "report.html")
    assert "Some of the layers" in page.text
    assert len(page.source) - len(plain.source) < 400_000
