from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megacpt.errors import CheckpointError, ConfigError
from megacpt.report import write_report
from megacpt.report.style import THEME
from tests.report.lab import Lab, write_metrics

Family = dict[str, Path]
CURVES = {"english": (8.0, 2.0), "python": (5.0, 4.0)}


class Page(HTMLParser):
    """Checks that tags close in order and ids are unique; collects text and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.words = ""
        self.source = text
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data + " "

    @property
    def text(self) -> str:
        """The words, with signs that look like ASCII characters written as those."""
        signs = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{MULTIPLICATION SIGN}": "x"})
        return " ".join(self.words.translate(signs).split())


def report(runs: list[Path], out: Path, **options: object) -> Page:
    written = write_report(runs, out, **options)  # type: ignore[arg-type]
    assert written == out
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compared(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Page:
    compare = {"replay <0 %>": [family["python-0-release"]]}
    out = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    return report([family["python-release"]], out, compare=compare, label="replay 25 %")


def test_the_page_says_what_was_learned_and_forgotten(compared: Page) -> None:
    text = compared.text
    assert "english → python → release" in text
    assert "Learned python from 4.40 to 1.84 bits a byte. Forgot english by 0.06 (by 0.55 with replay <0 %>)" in text
    assert re.search(r"average forgetting [^+-]* -0\.037 \+0\.220 ", text)
    assert re.search(r"maximum forgetting [^+-]* \+0\.060 \+0\.550 ", text)
    assert re.search(r"backward transfer [^+-]* \+0\.037 -0\.220 ", text)
    assert "python 2.420 +0.120 1.975 4.100 release 2.360 +0.060 1.840 -0.135" in text


def test_the_page_needs_nothing_else(compared: Page) -> None:
    assert "script" not in compared.tags
    assert "link" not in compared.tags
    assert all(link.startswith("#") for link in compared.links)
    assert compared.links


def test_ids_are_unique_over_all_figures_and_every_link_finds_its_target(compared: Page) -> None:
    assert len(set(compared.ids)) == len(compared.ids)
    assert {link[1:] for link in compared.links} <= set(compared.ids)


def test_the_tables_say_what_was_read(compared: Page) -> None:
    assert re.search(r"english 20\.5k 100 % 5\.12k replay, 25 % 1\.28k replay, 25 % 26\.9k 13\.44x", compared.text)
    assert "python - 15.4k 75 % 3.84k 75 % 19.2k 9.60x" in compared.text
    assert "release 5.12k 5 anneal 1e-4 16 x 64 25 % seen" in compared.text


def test_figures_name_streams_stages_and_lines(compared: Page) -> None:
    for words in ("english 2.36", "python 1.84", "c 4.00", "release (anneal)", "replay <0 %>", "learning rate"):
        assert words in compared.text


def test_the_matrix_is_shaded_by_what_was_forgotten(compared: Page) -> None:
    found = re.findall(r'<td class="heat (up|down)" style="--heat: ([0-9.]+)">([0-9.]+)<', compared.source)
    shown = {value: (kind, float(heat)) for kind, heat, value in found[:3]}
    assert shown == {"2.420": ("up", 0.53), "2.360": ("up", 0.27), "1.840": ("down", 0.6)}


def test_the_colours_of_figures_follow_the_theme(compared: Page) -> None:
    figures = re.findall(r"<svg.*?</svg>", compared.source, flags=re.DOTALL)
    assert len(figures) > 4
    assert not [colour for figure in figures for colour in re.findall(r": (#[0-9a-f]{6})\b", figure)]
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", compared.source))
    assert used <= set(THEME) | {"stream", "shade", "heat", "worse-rgb", "better-rgb"}


def test_each_figure_is_drawn_for_broad_and_narrow_screens(compared: Page) -> None:
    for name in ("held-out", "gaps", "training", "mixture"):
        for kind in ("broad", "narrow"):
            assert f'id="{name}-{kind}-figure_1"' in compared.source


def test_stability_gaps_and_phases_are_shown(saga: Family, tmp_path: Path) -> None:
    runs = [saga["release"], saga["c-release"]]
    text = report(runs, tmp_path / "report.html", compare={"replay 0 %": [saga["python-0"]]}).text
    assert "python english 2.300 +0.252 0.204 step 16 58 steps 59.3k tokens 6.20 +0.060" in text
    assert "tokens into the stage python english (replay) 0 75 % 25 % 102k 75 % 25 % 205k 50 % 50 % 307k" in text
    assert "c-release" in text
    assert text.count("into c-with-a-long-name") == 2  # a panel for broad and one for narrow screens


def test_a_folder_of_runs_is_a_report_of_all(family: Family, tmp_path: Path) -> None:
    text = report([family["english"].parent], tmp_path / "report.html").text
    assert "english → python → release" in text
    assert "python-0-release" in text


def test_the_page_is_the_same_each_time(family: Family, tmp_path: Path) -> None:
    runs = [family["python"]]
    first, second = (write_report(runs, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.html", "b.html"]


def test_branches_among_the_runs_are_drawn_beside(family: Family, tmp_path: Path) -> None:
    page = report(list(family.values()), tmp_path / "report.html")
    assert "Forgot english by 0.06 (by 0.55 with python-0-release)" in page.text
    assert "python-release" in page.text


def test_a_run_on_its_own(family: Family, tmp_path: Path) -> None:
    page = report([family["english"]], tmp_path / "report.html")
    assert "Learned english from 8.10 to 2.30 bits a byte." in page.text
    assert "orgotten by" not in page.text


def test_names_are_text_and_never_markup(lab: Lab, tmp_path: Path) -> None:
    run = lab.run("first", "english", {"english": (8.0, 2.0), "<b>&news": (5.0, 4.0)})
    page = report([run], tmp_path / "report.html", title="<i>one & two")
    assert "<b>&news 4.00" in page.text
    assert "<i>one & two" in page.text


def test_a_run_that_goes_on_is_called_unfinished(lab: Lab, tmp_path: Path) -> None:
    run = lab.run("first", "english", CURVES, steps=20, stopped_at=5)
    assert "The stage first is not complete: 25 % of its tokens so far." in report([run], tmp_path / "r.html").text


def test_what_is_missing_or_wrong_is_said(lab: Lab, tmp_path: Path) -> None:
    first = lab.run("first", "english", CURVES)
    run = lab.run("second", "python", CURVES, first)
    shutil.rmtree(first)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    broken = [{**line, "loss": float("nan")} if line["step"] in (3, 4) else line for line in lines]
    write_metrics(run, broken)
    (run / "metrics.jsonl").write_text("half\n" + (run / "metrics.jsonl").read_text())
    text = report([run], tmp_path / "report.html").text
    assert "Runs of earlier stages are not where they were, and are not drawn: first." in text
    assert "The training loss of second was not finite at 2 logged steps." in text
    assert "1 line of the metrics could not be read." in text


@pytest.mark.parametrize("kept", ["train", "eval"])
def test_a_run_with_one_kind_of_metrics(kept: str, lab: Lab, tmp_path: Path) -> None:
    run = lab.run("first", "english", CURVES)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_metrics(run, [line for line in lines if line["kind"] == kept])
    text = report([run], tmp_path / "report.html").text
    assert ("learning rate" in text) == (kept == "train")
    assert ("Held-out loss" in text) == (kept == "eval")


def test_a_single_point_of_each_curve_is_enough(lab: Lab, tmp_path: Path) -> None:
    run = lab.run("first", "english", CURVES, stopped_at=0)
    assert "english 8.00" in report([run], tmp_path / "report.html").text


def test_long_runs_make_no_large_pages(lab: Lab, tmp_path: Path) -> None:
    run = lab.run("first", "english", CURVES, steps=20_000)
    assert write_report([run], tmp_path / "report.html").stat().st_size < 250_000


def test_a_run_without_metrics_is_an_error_and_leaves_the_old_page(lab: Lab, tmp_path: Path) -> None:
    run = lab.run("first", "english", CURVES, stopped_at=0)
    write_metrics(run, [])
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(CheckpointError, match="has no metrics yet"):
        write_report([run], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_folder_is_no_page(family: Family, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder: give the name of a file, such as .*report\.html"):
        write_report([family["english"]], tmp_path)
    with pytest.raises(ConfigError, match=r"is a folder: give the name of a file, such as .*report\.json"):
        write_report([family["english"]], tmp_path / "report.html", json_out=tmp_path)
